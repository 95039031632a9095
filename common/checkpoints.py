"""Files that a crash leaves whole: one run to a folder, written in one step, checked when read."""

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


def claim(args: argparse.Namespace) -> None:
    """Locks --out for this run; on the first rank. Sets --resume auto to whether there is a run.
    Raises UserError where --resume finds nothing to resume, and where --out holds another run that
    nobody has asked to replace."""
    folder = Path(args.out)
    if distributed.rank() == 0:
        lock(folder)
    last = folder / "last.pt"
    if args.resume == "auto" and not last.exists():
        args.resume = None
    if args.resume and not last.exists():
        raise UserError(f"--resume: there is no {last}; leave --resume out to start")
    if last.exists() and not args.resume and not args.overwrite:
        raise UserError(
            f"{folder} holds a run; to go on with it: {distributed.resume_command()} "
            "(or replace it with --overwrite, or name another folder with --out)"
        )


def lock(folder: Path) -> None:
    """Makes `folder` and claims it for this process until `unlock` or until the process ends,
    however it ends; removes what an earlier one left half written. Raises UserError where another
    run has claimed it or nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # leaves nothing behind, killed or not
        _locks.append(os.open(folder, os.O_RDONLY))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from error
    try:
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--out {folder}: another run is writing there; name another") from error
    except OSError as error:  # some network file systems lock no folder
        print(f"{folder} cannot be locked: start no second run there ({error})", file=sys.stderr)
    for leftover in folder.glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def unlock() -> None:
    """Gives back what `lock` claimed."""
    while _locks:
        os.close(_locks.pop())


def write(path: Path, content: Callable[[Any], None]) -> None:
    """`content` writes an open binary file, which then takes the place of `path` in one step, so
    that a crash or a full disk leaves the old one whole. Raises UserError where it cannot."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        content(memory := io.BytesIO())  # torch.save hides the cause where a disk is full
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
    """Removes a file where it exists. Raises UserError where it cannot."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """`write` for text."""
    write(path, lambda file: file.write(text.encode()))


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """The dict in `path`, its weights loaded into `model`; nothing in it is run as code.
    Raises UserError for a file that is missing, damaged, or of another model."""
    try:
        # torch does not compare the checksums that it writes, and of an entry that one altered bit
        # makes a folder it reads nothing at all: it gets a copy of what zipfile has checked
        with (
            open(path, "rb") as file,
            zipfile.ZipFile(file) as archive,
            zipfile.ZipFile(checked := io.BytesIO(), "w") as copy,
        ):
            for name in dict.fromkeys(archive.namelist()):
                copy.writestr(name, archive.read(name))
        checked.seek(0)
        state = torch.load(checked, map_location="cpu", weights_only=True)
        weights = dict(state)["model"]
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file can fail anywhere in zip, pickle or torch
        raise UserError(f"{path} is not a checkpoint, or is cut off or altered") from error
    try:
        model.load_state_dict(weights)
    except Exception as error:  # whatever lies under "model"
        raise UserError(f"{path} is of another model than {type(model).__name__}") from error
    return state


# A resumed run is the same run: only these flags may change, and the number of ranks, which is no
# flag.
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


def check_flags(saved: dict[str, Any], args: argparse.Namespace, fixed: set[str]) -> None:
    """Raises UserError where a checkpoint's flags are not this run's, but for those that may
    change and are not in `fixed`."""
    for key, value in vars(args).items():
        if key not in MAY_CHANGE - fixed and saved.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"--resume: that run had {flag} {saved.get(key)}, not {value}")


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, on the host and on the GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
