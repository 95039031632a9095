"""The processes that torchrun starts: each trains on its part of every batch, torch adds up the
gradients. Without torchrun there is one, and nothing here does anything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError

LOCAL = int(os.environ.get("LOCAL_RANK", 0))  # the number of this process on its machine
PATIENCE = timedelta(seconds=50)  # with one that hangs; of one that died the others hear at once


def ranks() -> tuple[int, int]:
    """The number of this process, and of how many: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join(device: str) -> None:
    """Joins the processes, each with a GPU of its own on "cuda". Raises UserError."""
    if device == "cuda":
        if torch.cuda.device_count() <= LOCAL:
            raise UserError(f"--nproc_per_node: at most {torch.cuda.device_count()}, a GPU each")
        torch.cuda.set_device(LOCAL)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # a long time, as the others wait while the first downloads
        limit = timedelta(hours=1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=limit)


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process of each machine goes through the block alone, the others after it."""
    if LOCAL > 0 and dist.is_initialized():
        dist.barrier()
    yield
    if LOCAL == 0 and dist.is_initialized():
        dist.barrier()


def parallel(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model as it is trained, and the group that trains it: None for a process alone."""
    if not dist.is_initialized():
        return model, None
    dist.barrier()  # for as long as it takes: from here on PATIENCE holds
    group = dist.new_group(timeout=PATIENCE)
    return DistributedDataParallel(model, process_group=group), group


def share(*batch: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """This process's part of a batch, and how many images of it count: where none is left for it,
    it works on the first for nothing, as the others wait for its gradient."""
    rank, world = ranks()
    left = rank < len(batch[0])
    part = tuple(each[slice(rank, None, world) if left else slice(1)] for each in batch)
    return part, len(part[0]) if left else 0


def total(values: dict[str, Any], group: Any) -> dict[str, Any]:
    """Numbers or scalar tensors, added up over the group; the same bits in each process."""
    if group is None:
        return values
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    stacked = torch.tensor(list(map(float, values.values())), dtype=torch.float64, device=device)
    dist.all_reduce(stacked, group=group)
    return dict(zip(values, stacked, strict=True))


def is_lost(error: RuntimeError) -> bool:
    """Whether `error` says that another process ended or hangs."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
