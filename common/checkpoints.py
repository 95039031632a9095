"""Files that a crash leaves whole: one run to a folder, written in one step, checked when read."""

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
from torch import nn

from common import UserError

_locks: list[int] = []  # open folders


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
        with open(temporary, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error.__context__ or error  # of a full disk torch.save makes a RuntimeError
        raise UserError(f"cannot write {path}: {cause}") from error


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
