"""Flags and error handling of the scripts: an error is one line on stderr and exit code 2."""

import argparse
import math
import os
import re
import signal
import sys
import timeit
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import UserError
from common.checkpoints import unlock
from common.data import choose, held_out
from common.distributed import is_lost, resume_command

DRY_RUN = {"train_size": 320, "epochs": 2, "batch_size": 32}
_parsed = argparse.Namespace()  # the flags; `run` reads the batch size for its advice


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind: type, low: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number >= low, or > low if `above`; integers below 2^31."""

    def parse(text: str):
        value = kind(text)
        if math.isnan(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number")
        if value >= (2**31 if kind is int else math.inf):
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not (value > low if above else value >= low):
            raise argparse.ArgumentTypeError(f"{text} is not {'>' if above else '>='} {low}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's own message
    return parse


def path(text: str) -> str:
    """An argparse type: a path that is not empty, with "~" expanded."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def parser(
    doc: str, *, epochs: int, batch_size: int, lr: float, min_delta: float = 1e-6, **settings
) -> Parser:
    """A parser with the flags of both training scripts. doc: the script's docstring; settings: of
    argparse.ArgumentParser."""
    formatter = argparse.RawDescriptionHelpFormatter
    p = Parser(description=doc, formatter_class=formatter, **settings)
    count = number(int, 1)
    # data
    data_flags(p)
    choice(p, "--test-data", "same", "cifar10", "synthetic", note=", as --data")
    p.add_argument(
        "--train-size",
        type=number(int, 2),
        metavar="N",
        help="images, of which a tenth is the validation set (default: all 50,000)",
    )
    # training
    shown = "default: %(default)s"
    p.add_argument("--epochs", type=number(int, 0), default=epochs, help=f"at most; {shown}")
    p.add_argument("--batch-size", type=count, default=batch_size, help=shown)
    p.add_argument("--lr", type=number(float, 0, above=True), default=lr, help=shown)
    p.add_argument("--seed", type=number(int, 0), default=0, help=shown)
    p.add_argument("--patience", type=count, default=10, help=f"epochs; {shown}")
    p.add_argument("--min-delta", type=number(float, 0), default=min_delta, help=shown)
    choice(p, "--stop-rule", "patience", "window")
    # machine
    choice(p, "--device", "auto", "cpu", "cuda", note=", a GPU where there is one")
    choice(p, "--precision", "fp32", "bf16")
    # output
    p.add_argument("--out", type=path, help="the run's folder (default: runs/ and the variant)")
    p.add_argument(
        "--resume",
        nargs="?",
        choices=["must", "auto"],
        const="must",
        help="resume from last.pt in --out; auto: start if there is none, for requeued jobs",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    p.add_argument(
        "--wandb",
        choices=["online", "offline", "disabled"],
        default=os.environ.get("WANDB_MODE") or "offline",
        help="default: $WANDB_MODE, else offline",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="2 epochs on a few images in batches of at most 32; replaces its own default folder",
    )
    return p


def choice(p: Parser, flag: str, *values: str, note: str = "") -> None:
    """Adds a flag that takes one of `values`, by default the first."""
    p.add_argument(flag, choices=values, default=values[0], help=f"default: %(default)s{note}")


def data_flags(p: Parser) -> None:
    """Adds --data and --data-dir."""
    choice(p, "--data", "auto", "cifar10", "synthetic", note=", CIFAR-10 where --data-dir holds it")
    default = os.environ.get("DATA_DIR") or "data"
    p.add_argument("--data-dir", type=path, default=default, help="default: $DATA_DIR, else data")


# Flags whose values name the default folder, so that each variant of a training has its own.
VARIANTS = ("model", "init", "flip", "perceptual", "data", "stop_rule", "precision")


def parse(p: Parser, name: str) -> argparse.Namespace:
    """Parses the flags. Replaces --data auto by the data set found, since a resumed run must use
    the same one, and limits the batch size to the training images. The default of --out is
    runs/NAME plus the VARIANTS flags that are not at their default. Raises UserError."""
    args = p.parse_args()
    if args.resume and args.overwrite:
        p.error("--resume continues a run and --overwrite replaces it: give one of them")
    if args.wandb not in ("online", "offline", "disabled"):  # argparse does not check defaults
        p.error(f"WANDB_MODE is {args.wandb!r}, not online, offline or disabled")
    if args.dry_run:
        for key, most in DRY_RUN.items():
            asked = getattr(args, key)
            setattr(args, key, most if asked is None else min(asked, most))
    args.data = choose(args.data, args.data_dir)
    images = args.train_size or 50_000
    args.batch_size = min(args.batch_size, images - held_out(images))
    if args.out is None:
        special = [key for key in VARIANTS if getattr(args, key, None) != p.get_default(key)]
        values = [key if key == "perceptual" else getattr(args, key) for key in special]
        words = [name, *(value for value in values if value != "cifar10")]
        args.out = "runs/" + "-".join([*words, *(["dry-run"] if args.dry_run else [])])
        args.overwrite |= args.dry_run and not args.resume  # a dry run needs no protection
    vars(_parsed).update(vars(args))
    return args


def autocast(args: argparse.Namespace) -> torch.autocast:
    """torch.autocast to bfloat16 under --precision bf16; disabled otherwise."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def bfloat16_factor() -> float:
    """How many times slower bfloat16 is than float32 on this CPU: one convolution of the CNN in
    both, the fastest of three runs each. Processors without units for bfloat16 emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):  # without random numbers: a run has its own
        image, weight = (
            torch.ones(shape, dtype=dtype) for shape in ((1, 64, 30, 30), (64, 64, 4, 4))
        )
        convolve = partial(torch.nn.functional.conv2d, image, weight)
        convolve()
        seconds[dtype] = min(timeit.repeat(convolve, number=1, repeat=3))
    return seconds[torch.bfloat16] / seconds[torch.float32]


def warn_if_emulated(args: argparse.Namespace) -> None:
    """One line on stderr where --precision bf16 is slower than fp32."""
    if args.precision == "bf16" and args.device == "cpu" and (factor := bfloat16_factor()) > 1.5:
        print(
            f"warning: --precision bf16 is {factor:.0f} times slower than fp32 on this processor",
            file=sys.stderr,
        )


class Stream:
    """Wraps stdout or stderr so that writing cannot fail. Output to a closed pipe or a full disk is
    dropped; the run's files hold the same figures."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        with suppress(AttributeError):  # None, or a replacement
            stream.reconfigure(errors="backslashreplace")  # a file name may not be valid UTF-8

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError, AttributeError):
            with suppress(OSError, ValueError, AttributeError):  # for the flush at exit
                number = self.stream.fileno()  # first: a stream that is None has none to replace
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a UserError becomes one line on stderr and exit code 2."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the script sets SIG_DFL for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has no exception class for out of host memory: only the message tells
        known = r"(?i)allocate|bad_alloc|alloc_failed|out of memory|storage size"
        if re.search(known, str(error)) or isinstance(error, MemoryError):
            half = max(1, getattr(_parsed, "batch_size", 2) // 2)
            fail(f"out of memory: try --batch-size {half} or fewer images")
        if not is_lost(error):
            raise
        print(f"another process ended or hangs; resume: {resume_command()}", file=sys.stderr)
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before training; Run handles signals during training
        sys.exit(128 + signal.SIGINT)
    finally:
        unlock()


def fail(message: str) -> None:
    """Ends the script with one line and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
