"""CIFAR-10 or synthetic images, as uint8 tensors in batches, with their ground truth."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from common import UserError, distributed
from common.cifar10 import cifar10, cifar10_on_disk
from common.transforms import reference_transform


class Split(NamedTuple):
    """images: (N, 3, 32, 32) uint8; targets: (N, 1, 28, 28) float32, their ground truth."""

    images: Tensor
    targets: Tensor


class Data(NamedTuple):
    """The three splits on one device. name, test_name: "cifar10" or "synthetic"."""

    name: str
    test_name: str
    train: Split
    val: Split
    test: Split


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Loads the data that the flags select. Raises UserError."""
    with distributed.first_rank_first():  # one rank downloads
        return load(
            args.data,
            args.data_dir,
            test_name=args.test_data,
            train_size=args.train_size,
            test_size=args.train_size if args.dry_run else None,
            seed=args.seed,
            device=device,
        )


def load(
    name: str, root: str, *, test_name: str, train_size: int | None, test_size: int | None,
    seed: int, device: torch.device,
) -> Data:  # fmt: skip
    """The data of one run. A tenth of the training images, chosen by seed, is the validation set.

    name: "auto" (CIFAR-10 where `root` holds it, else synthetic), "cifar10" or "synthetic";
    test_name: "same" or one of these two. Sizes: None for all (50,000 and 10,000).
    Raises UserError if data are missing or damaged, or if there are fewer images than requested.
    """
    name = choose(name, root)
    if test_name == "cifar10":
        choose(test_name, root)
    test_name = name if test_name == "same" else test_name
    pool = images(name, root, True, train_size, seed)
    test = images(test_name, root, False, test_size, seed)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    n = held_out(len(pool))
    splits = (pool[order[n:]], pool[order[:n]], test)
    return Data(name, test_name, *(_with_targets(split.to(device)) for split in splits))


def held_out(size: int) -> int:
    """How many of the training images are for validation."""
    return max(1, size // 10)


def choose(name: str, root: str) -> str:
    """Resolves "auto": "cifar10" if `root` holds it, else "synthetic" with a warning. Raises
    UserError if `root` is not the default "data" and does not hold CIFAR-10: always under "auto",
    and also if CIFAR-10 is found in a folder inside, beside or above `root`."""
    folder = Path(root)
    if name == "synthetic" or cifar10_on_disk(folder):
        return "cifar10" if name == "auto" else name
    if folder != Path("data"):
        whole = Path(os.path.abspath(folder))  # resolve() would fail at a loop of links
        near = [place for place in (whole.parent, *_folders(whole), *_folders(whole.parent))
                if cifar10_on_disk(place)]  # fmt: skip
        if near:
            raise UserError(f"--data-dir {root} holds no CIFAR-10; {near[0]} does")
        if name == "auto":
            missing = "" if os.path.isdir(folder) else ": no such folder"
            raise UserError(
                f"--data-dir {root} holds no CIFAR-10{missing}; name the folder that holds "
                f"{CIFAR10.base_folder}, or use --data synthetic"
            )
    if name == "auto":
        name = "synthetic"
        print(f"warning: {root} holds no CIFAR-10: using synthetic images instead", file=sys.stderr)
    return name


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if os.path.isdir(each))
    except OSError:
        return []


def _with_targets(images: Tensor) -> Split:
    return Split(images, torch.cat([reference_transform(chunk) for chunk in images.split(1000)]))


def images(name: str, root: str, train: bool, size: int | None, seed: int) -> Tensor:
    """(size, 3, 32, 32) uint8: the first training or test images of "cifar10" or "synthetic";
    size: None for all (50,000 and 10,000). Raises UserError."""
    full = 50_000 if train else 10_000
    size = full if size is None else size
    if name == "synthetic":
        return synthetic(size, 2 * seed + train)  # the test images have another seed
    if size > full:
        kind = "training" if train else "test"
        raise UserError(f"CIFAR-10 has {full} {kind} images, not {size}: ask for fewer")
    return cifar10(Path(root), train)[:size]


def batches(
    split: Split, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch from batch `start` on, in a random order that depends only on seed and epoch:
    images (B, 3, 32, 32) float32 in [0, 1], targets (B, 1, 28, 28). The last may be smaller."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split.images), generator=generator).to(split.images.device)
    for indices in order.split(batch_size)[start:]:
        # index_select copies whole images; indexing with a tensor copies single bytes
        yield (
            to_float(split.images.index_select(0, indices)),
            split.targets.index_select(0, indices),
        )


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]."""
    return images.float().mul_(1 / 255)


def synthetic(size: int, seed: int, height: int = 32, width: int = 32) -> Tensor:
    """(size, 3, height, width) uint8 images with the second-order statistics of natural images: a
    1/f amplitude spectrum and strongly correlated channels (Field 1987; Ruderman, Cronin, Chiao
    1998). Brightness and contrast vary from image to image."""
    generator = torch.Generator().manual_seed(seed)
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (fx.square() + fy.square()).sqrt().clamp(min=1 / max(height, width))
    try:
        images = torch.empty(size, 3, height, width, dtype=torch.uint8)
    except RuntimeError as error:  # torch has no exception class for out of host memory
        raise UserError(f"{size} images do not fit into memory: ask for fewer") from error
    for chunk in images.split(1000):
        n = len(chunk)
        noise = torch.randn(n, 3, height, width, generator=generator)
        field = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
        field = field / field.std(dim=(1, 2, 3), keepdim=True)
        field = field[:, :1] + 0.4 * field
        contrast = torch.empty(n, 1, 1, 1).uniform_(0.1, 0.35, generator=generator)
        brightness = torch.empty(n, 1, 1, 1).uniform_(0.3, 0.7, generator=generator)
        chunk.copy_((field * contrast + brightness).clamp(0, 1).mul(255).round())
    return images
