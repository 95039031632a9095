"""Crash-safe files: one run per folder, atomic writes, checksums verified on reading."""

import argparse
import fcntl
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import UserError, distributed

_locks: list[int] = []  # open folders
WRITTEN = ("best.pt", "last.pt", "history.jsonl", "metrics.json", "loss.png", "samples.png")
WRITTEN += ("bench-*",)  # what the scripts write into --out


def claim(args: argparse.Namespace, fixed: set[str] = frozenset()) -> None:
    """Locks --out for this run; on the first rank. Replaces --resume auto by None if there is no
    run. fixed: as in `check_flags`. Raises UserError if there is nothing to resume, or if --out
    holds another run and --overwrite is not given."""
    folder = Path(args.out)
    if distributed.rank() == 0:
        lock(folder)
    last = folder / "last.pt"
    if args.resume == "auto" and not last.exists():
        args.resume = None
    if args.resume and not last.exists():
        raise UserError(f"--resume: there is no {last}; leave --resume out to start")
    if args.resume or args.overwrite:
        return
    other = "name another folder with --out, or replace the run with --overwrite"
    if last.exists():
        try:  # --resume would refuse other flags
            check_flags(read_checkpoint(last).get("args"), args, fixed)
        except UserError as error:
            raise UserError(f"{error}: {other}") from error
        raise UserError(
            f"{folder} holds a run; resume it: {distributed.resume_command()} (or {other})"
        )
    if (folder / "best.pt").exists() and (folder / "metrics.json").exists():  # last.pt is large
        raise UserError(f"{folder} holds a complete run without last.pt: {other}")


def lock(folder: Path) -> None:
    """Creates `folder` and locks it until `unlock` or the end of the process; removes temporary
    files of an earlier process. Raises UserError if another run holds the lock or nothing can be
    written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # has no name, so a kill leaves no file
        _locks.append(os.open(folder, os.O_RDONLY))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from error
    try:
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"--out {folder}: another run is writing there; name another folder"
        ) from error
    except OSError as error:  # some network file systems cannot lock folders
        print(f"{folder} cannot be locked: start no second run there ({error})", file=sys.stderr)
    for name in WRITTEN:
        for leftover in folder.glob(f".{name}.tmp"):
            with suppress(OSError):
                leftover.unlink()


def unlock() -> None:
    """Releases the locks that `lock` took."""
    while _locks:
        os.close(_locks.pop())


def write(path: Path, content: Callable[[Any], None]) -> None:
    """Atomic write: `content` writes to an open binary file, which then replaces `path` by a
    rename. A crash or a full disk leaves the old file intact. Raises UserError on failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        content(memory := io.BytesIO())  # torch.save hides the cause if a disk is full
        with open(temporary, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Removes a file if it exists. Raises UserError on failure."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """`write` for text."""
    write(path, lambda file: file.write(text.encode()))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dict, with "model" in it; runs no code from the file. Raises UserError for a file
    that is missing or damaged."""
    try:
        # torch does not verify the checksums that it writes. If one flipped bit marks an entry as
        # a folder, torch returns uninitialised memory. So torch reads a copy that zipfile verified.
        with (
            open(path, "rb") as file,
            zipfile.ZipFile(file) as archive,
            zipfile.ZipFile(checked := io.BytesIO(), "w") as copy,
        ):
            for name in dict.fromkeys(archive.namelist()):
                copy.writestr(name, archive.read(name))
        checked.seek(0)
        state = torch.load(checked, map_location="cpu", weights_only=True)
        return {"model": state["model"], **state}  # raises if it is no dict, or without weights
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # zipfile, pickle and torch raise many types for damaged files
        raise UserError(f"{path} is not a checkpoint, or is cut off or altered") from error


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads the weights in `path` into `model` and returns the file's dict. Raises UserError as
    `read_checkpoint`, and for a file of another model."""
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
    except Exception as error:  # "model" may hold any object
        raise UserError(f"{path} is of another model than {type(model).__name__}") from error
    return state


# A resumed run may change only these flags, and the number of ranks.
MAY_CHANGE = {
    "compare",
    "data_dir",
    "test_data",
    "device",
    "epochs",
    "out",
    "overwrite",
    "resume",
    "wandb",
}


def check_flags(saved: Any, args: argparse.Namespace, fixed: set[str]) -> None:
    """Raises UserError if a flag differs from the checkpoint's, except flags in MAY_CHANGE that
    are not in `fixed`."""
    saved = saved if isinstance(saved, dict) else {}  # the file may hold any object
    for key, value in vars(args).items():
        if key not in MAY_CHANGE - fixed and saved.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"the run in {args.out} had {flag} {saved.get(key)}, not {value}")


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, on the host and on the GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
