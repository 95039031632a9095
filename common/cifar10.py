"""CIFAR-10 on disk: found, extracted, or downloaded, by one process at a time."""

import fcntl
import os
import shutil
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from common import UserError

ARCHIVE_MB = 163
DOWNLOAD_LIMIT_S = 1800  # the host has been seen to throttle to 50 kB/s: an hour for the archive


def cifar10(root: Path, train: bool) -> Tensor:
    """(N, 3, 32, 32) uint8, all training or test images, by torchvision, which checks every md5.
    Downloads the archive if `root` does not hold it. Raises UserError on failure."""
    if not cifar10_on_disk(root):
        _download(root)
    folder = root / CIFAR10.base_folder
    try:
        if not os.path.isdir(folder):
            _extract(root)
        before = _stamps(folder)
        dataset = CIFAR10(root, train=train)
        if before and _stamps(folder) != before:  # after the md5 check
            raise OSError("the folder was changed while it was read; start again")
    except Exception as error:  # torchvision, tarfile and pickle raise many types
        _name_the_damaged_file(root)
        raise UserError(f"CIFAR-10 in {root} cannot be read: {error}") from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()


def _extract(root: Path) -> None:
    """Extracts the archive without checking its md5, since the md5 of each extracted file is
    checked on reading. The folder appears atomically."""
    temporary = root / f".{CIFAR10.base_folder}.tmp"
    with _alone(root):
        if os.path.isdir(root / CIFAR10.base_folder):  # by another process in the meantime
            return
        try:
            with tarfile.open(root / CIFAR10.filename) as archive:
                # none before 3.11.4
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(temporary)
            (temporary / CIFAR10.base_folder).replace(root / CIFAR10.base_folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Waits while another process downloads or extracts into `root`. If `root` cannot hold a lock,
    the block runs without one: it fails itself if nothing can be written there."""
    path, held = root / f".{CIFAR10.base_folder}.lock", False
    with ExitStack() as stack:
        with suppress(OSError):
            while not held:
                lock = stack.enter_context(open(path, "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                held = os.fstat(lock.fileno()).st_nlink > 0  # 0: its last holder has removed it
            stack.callback(path.unlink, missing_ok=True)
        yield


def cifar10_on_disk(root: Path) -> bool:
    """Whether `root` has CIFAR-10, extracted or as the archive, damaged or not: nobody who has
    CIFAR-10 silently trains on synthetic images. A folder that may not be read holds nothing."""
    # Path.is_dir and is_file would raise PermissionError there
    return os.path.isdir(root / CIFAR10.base_folder) or os.path.isfile(root / CIFAR10.filename)


def _stamps(folder: Path) -> list[tuple]:
    """Name, inode, modification time and size of each file, to detect changes."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*"))]
    return [(name, each.st_ino, each.st_mtime_ns, each.st_size) for name, each in stats]


def _name_the_damaged_file(root: Path) -> None:
    folder = root / CIFAR10.base_folder
    if os.path.isdir(folder):
        meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
        files = [(folder / n, md5) for n, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta)]
    else:
        files = [(root / CIFAR10.filename, CIFAR10.tgz_md5)]
    for path, expected in files:
        try:
            md5 = calculate_md5(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; its md5 should be {expected}") from error
        if md5 != expected:
            raise UserError(f"{path} is damaged: its md5 is {md5}, it should be {expected}")


def _download(root: Path) -> None:
    """Downloads the archive into `root` within DOWNLOAD_LIMIT_S, unless another process does."""
    if not os.path.isdir(root) and root != Path("data"):  # only the default is created
        raise UserError(f"no such folder: {root} (--data-dir)")
    archive = root / CIFAR10.filename
    print(f"downloading {CIFAR10.url} ({ARCHIVE_MB} MB) to {archive}")
    deadline = time.monotonic() + DOWNLOAD_LIMIT_S  # includes waiting for another process
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            if not cifar10_on_disk(root):
                _fetch(archive, deadline)
    except OSError as error:
        raise UserError(
            f"cannot download CIFAR-10: {error}. Put {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) "
            f"or the folder {CIFAR10.base_folder} into {root}, or use --data synthetic"
        ) from error


def _fetch(archive: Path, deadline: float) -> None:
    """Downloads `archive` through a temporary file. Raises OSError."""
    temporary = archive.with_suffix(".part")
    try:
        with (
            urllib.request.urlopen(CIFAR10.url, timeout=20) as response,
            open(temporary, "wb") as file,
            tqdm(total=ARCHIVE_MB * 10**6, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read1(1 << 20):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done within {DOWNLOAD_LIMIT_S} s")
                file.write(chunk)
                bar.update(len(chunk))
        if calculate_md5(temporary) != CIFAR10.tgz_md5:
            raise OSError("the downloaded file has the wrong md5")
        temporary.replace(archive)
    finally:
        temporary.unlink(missing_ok=True)
