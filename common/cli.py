"""The flags of the scripts, and what a mistake looks like: one line and exit code 2."""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import UserError
from common.checkpoints import unlock
from common.distributed import is_lost, resume_command

DRY_RUN = {"train_size": 320, "epochs": 2, "batch_size": 32}
_parsed = argparse.Namespace()  # the flags, for `run` to name in its advice


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind: type, low: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number >= low, or > low where `above`; integers below 2^31."""

    def parse(text: str):
        value = kind(text)
        if not (value < (2**31 if kind is int else math.inf)):
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not (value > low if above else value >= low):
            raise argparse.ArgumentTypeError(f"{text} is not {'>' if above else '>='} {low}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's own message
    return parse


def parser(doc: str, *, epochs: int, batch_size: int, lr: float) -> Parser:
    """The flags that both training scripts have. doc: the script's docstring."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number(int, 1)
    # data
    p.add_argument("--data", choices=["auto", "cifar10", "synthetic"], default="auto")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"), help="%(default)s")
    p.add_argument("--test-data", choices=["same", "cifar10", "synthetic"], default="same")
    p.add_argument(
        "--train-size", type=number(int, 2), metavar="N", help="images, of which a tenth validates"
    )
    # training
    p.add_argument("--epochs", type=number(int, 0), default=epochs, help="at most (%(default)s)")
    p.add_argument("--batch-size", type=count, default=batch_size, help="%(default)s")
    p.add_argument("--lr", type=number(float, 0, above=True), default=lr, help="%(default)s")
    p.add_argument("--seed", type=number(int, 0), default=0, help="%(default)s")
    p.add_argument("--patience", type=count, default=10, help="epochs (%(default)s)")
    p.add_argument("--min-delta", type=number(float, 0), default=1e-6, help="%(default)s")
    p.add_argument("--stop-rule", choices=["patience", "window"], default="patience")
    # machine
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    # output
    p.add_argument("--out", help="the run's folder (default: runs/ and the model's name)")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    p.add_argument(
        "--wandb",
        choices=["online", "offline", "disabled"],
        default=os.environ.get("WANDB_MODE") or "offline",
    )
    p.add_argument("--dry-run", action="store_true", help="2 epochs on a few images, in seconds")
    return p


def parse(p: Parser, out: Callable[[argparse.Namespace], str]) -> argparse.Namespace:
    """The flags. out: the flags -> the default of --out."""
    args = p.parse_args()
    if args.wandb not in ("online", "offline", "disabled"):  # argparse does not check defaults
        p.error(f"WANDB_MODE is {args.wandb!r}, not online, offline or disabled")
    if args.dry_run:
        for key, most in DRY_RUN.items():
            asked = getattr(args, key)
            setattr(args, key, most if asked is None else min(asked, most))
    args.out = args.out or out(args) + ("-dry-run" if args.dry_run else "")
    vars(_parsed).update(vars(args))
    return args


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 where --precision asks for it."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a user's mistake becomes one line and exit code 2."""
    with suppress(AttributeError):  # no stdout, or a stand-in
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no valid text
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # for the host's memory torch has no class of its own, only messages
        known = r"(?i)allocate|bad_alloc|alloc_failed|out of memory|storage size"
        if re.search(known, str(error)) or isinstance(error, MemoryError):
            half = max(1, getattr(_parsed, "batch_size", 2) // 2)
            fail(f"out of memory: try --batch-size {half} or fewer images")
        if not is_lost(error):
            raise
        print(f"another process ended or hangs; to go on: {resume_command()}", file=sys.stderr)
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the training, which handles signals itself
        sys.exit(128 + signal.SIGINT)
    finally:
        unlock()


def fail(message: str) -> None:
    """Ends the script with one line and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
