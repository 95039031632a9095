"""Runs a model on a whole split: its outputs, and the means of loss and accuracy."""

import argparse

import torch
from torch import Tensor, nn

from common import distributed, metrics
from common.cli import autocast
from common.data import Split, to_float


@torch.inference_mode()
def predict(
    model: nn.Module, loss_fn: nn.Module, split: Split, args: argparse.Namespace
) -> tuple[Tensor, dict[str, float]]:
    """The outputs, (N, 1, 28, 28) float32, and the means of the loss and of its `terms`."""
    model.eval()
    outputs, sums = [], {}
    for start in range(0, len(split.images), args.batch_size):
        images, targets = (part[start : start + args.batch_size] for part in split)
        with autocast(args):
            output = model(to_float(images))
            loss = loss_fn(output, targets)
        for name, value in {"loss": loss, **getattr(loss_fn, "terms", {})}.items():
            sums[name] = sums.get(name, 0) + value.double() * len(images)
        outputs.append(output.float())
    return torch.cat(outputs), {k: v.item() / len(split.images) for k, v in sums.items()}


def evaluate(
    model: nn.Module, loss_fn: nn.Module, split: Split, args: argparse.Namespace
) -> dict[str, float]:
    """The means of loss, terms and accuracy over `split`; each rank evaluates a share."""
    shard = distributed.shard(*split)
    outputs, means = predict(model, loss_fn, Split(shard.images, shard.targets), args)
    means["accuracy_0.95"] = metrics.accuracy(outputs, shard.targets, 0.95)
    weight = shard.count / len(split.images)
    means = distributed.total({name: value * weight for name, value in means.items()})
    return {name: float(value) for name, value in means.items()}
