"""What an epoch of train_fc.py costs beside the bare matrix products of its forward and backward
pass, in turn in one process. Not a test: it asserts nothing.

    DATA_DIR=... python tests/measure_fc_epoch.py [rounds] [--batch-size N]
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_fc
from common import training
from common.data import to_float


def bare_products(images: torch.Tensor, batch_size: int) -> float:
    """Seconds for the five products of one epoch over images (N, 3072) float32."""
    first, second = torch.rand(128, 3072), torch.rand(784, 128)
    b1, b2 = torch.rand(128), torch.rand(784)
    start = time.perf_counter()
    for x in images.split(batch_size):
        hidden = torch.addmm(b1, x, first.T)
        out = torch.addmm(b2, hidden, second.T)
        _ = (
            out.T @ hidden,
            out @ second,
            hidden.T @ x,
        )  # the last has the shape of hidden's gradient
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv.pop(1)) if sys.argv[1:2] and sys.argv[1].isdigit() else 7
    epochs, bare = [], []

    def report(model, loss_fn, data, args, state, *rest) -> None:
        images = to_float(data.train.images).flatten(1)
        bare.append(bare_products(images, args.batch_size))
        epochs.append(state["history"][0]["seconds"])
        if len(epochs) == rounds:
            print(
                f"data: {data.name}, batches of {args.batch_size}, {os.cpu_count()} cores, "
                f"torch {torch.__version__}"
            )

    training.report = report  # in place of the test set and the pictures
    with tempfile.TemporaryDirectory() as out:
        sys.argv[1:] += ["--epochs", "1", "--wandb", "disabled", "--out", out]
        for _ in range(rounds):
            train_fc.main()
            training.unlock()
    ratios = [epoch / products for epoch, products in zip(epochs, bare, strict=True)]
    for name, values in (("epoch s", epochs), ("products s", bare), ("ratio", ratios)):
        low, middle, high = (min(values), statistics.median(values), max(values))
        print(f"{name:12} median {middle:.3f}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
