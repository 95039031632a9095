"""Data-parallel training under torchrun: each rank trains on its share of every batch, and DDP
averages the gradients. Without torchrun there is one rank, and these functions do nothing."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError

# The other ranks wait while the first one downloads.
SETUP_TIMEOUT = timedelta(hours=1)
# The timeout for a rank that hangs, longer than any delay by other load on the machine. A rank that
# died is noticed immediately.
STEP_TIMEOUT = timedelta(minutes=10)
_group: Any = None  # the process group of the training, with STEP_TIMEOUT


class Shard(NamedTuple):
    """A rank's share of a batch. count: the number of its images. weight: the factor of its loss
    that turns DDP's mean over the ranks into the mean over all images of the batch."""

    images: Tensor
    targets: Tensor
    count: int
    weight: float


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _setting(name: str, default: str | None = None) -> int:
    """An integer that torchrun sets in the environment. Raises UserError."""
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal():
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r} and {name} is {text!r}: start several "
            "processes with torchrun, or unset WORLD_SIZE"
        )
    return int(text)


def local_rank() -> int:
    """The rank of this process on its machine."""
    return _setting("LOCAL_RANK", "0") if dist.is_initialized() else 0


def devices(asked: str) -> list[str]:
    """The devices that --device selects, the fastest last: "auto" is the CPU, then CUDA if
    available. Raises UserError."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if asked != "auto":
        return [asked]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def init(args: argparse.Namespace) -> torch.device:
    """Returns the device of --device and replaces "auto" by it; each rank gets its own GPU. Joins
    the process group under torchrun, where only the first rank prints. Raises UserError."""
    args.device = devices(args.device)[-1]
    device = torch.device(args.device)
    if "WORLD_SIZE" in os.environ and _setting("WORLD_SIZE") > 1:
        local, _ = _setting("LOCAL_RANK"), _setting("RANK")
        if device.type == "cuda":
            if torch.cuda.device_count() <= local:
                count = torch.cuda.device_count()
                raise UserError(f"--nproc_per_node: at most {count}, one for each GPU")
            torch.cuda.set_device(local)
        # gloo beside NCCL: `total` sums numbers without waiting for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=SETUP_TIMEOUT)
        except (ValueError, dist.DistError) as error:  # e.g. no MASTER_ADDR
            raise UserError(f"cannot join the other processes: {error}; use torchrun") from error
    if rank() > 0:
        sys.stdout = None  # makes print do nothing
    return device


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank of each machine runs the block before the others, which find its files."""
    if dist.is_initialized() and local_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and local_rank() == 0:
        dist.barrier()


def wrap(model: nn.Module) -> nn.Module:
    """The module to train: DistributedDataParallel over `model` under torchrun, else `model`. Not
    compiled: on an H100 the FC net's epochs took a quarter longer as CUDA graphs."""
    global _group
    _group = None
    if not dist.is_initialized():
        return model
    dist.barrier()  # within SETUP_TIMEOUT; STEP_TIMEOUT applies afterwards
    _group = dist.new_group(timeout=STEP_TIMEOUT)
    return DistributedDataParallel(model, process_group=_group)


def shard(images: Tensor, targets: Tensor) -> Shard:
    """This rank's share of a batch. A rank without images gets the first one with weight 0, since
    DDP's all-reduce needs every rank."""
    first, world, total_count = rank(), world_size(), len(images)
    left = first < total_count
    part = slice(first, None, world) if left else slice(1)
    count = len(images[part]) if left else 0
    weight = count * world / total_count if total_count else 0.0
    return Shard(images[part], targets[part], count, weight)


def total(values: dict[str, Any]) -> dict[str, Any]:
    """All-reduce: numbers or scalar tensors, summed over the ranks in float64; bit-identical on all
    ranks. Each sum stays on the device of its tensor, and the host does not wait for it."""
    if _group is None:
        return values
    scalars = {name: torch.as_tensor(x, dtype=torch.float64) for name, x in values.items()}
    for device in dict.fromkeys(x.device for x in scalars.values()):
        names = [name for name, x in scalars.items() if x.device == device]
        stacked = torch.stack([scalars[name] for name in names])
        dist.all_reduce(stacked, group=_group)
        scalars.update(zip(names, stacked, strict=True))
    return scalars


def is_lost(error: RuntimeError) -> bool:
    """Whether `error` says that another rank ended or hangs."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def resume_command() -> str:
    """The command of this run with --resume."""
    several = ["torchrun", "--standalone", f"--nproc_per_node={world_size()}"]
    flags = [flag for flag in sys.argv[1:] if flag != "--overwrite"]
    resume = [] if any(flag.startswith("--resume") for flag in flags) else ["--resume"]
    start = several if world_size() > 1 else ["python"]
    return shlex.join([*start, sys.argv[0], *flags, *resume])
