"""One training run and its folder: what --resume restores, and when it is saved. A Run never calls
the model, the loss or the optimizer: the script does.

last.pt         the complete state for --resume  history.jsonl   one line per epoch
best.pt         the weights with the lowest validation loss
"""

import argparse
import json
import math
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, distributed
from common.checkpoints import (
    check_flags,
    load_checkpoint,
    random_state,
    remove,
    set_random_state,
    write,
    write_text,
)
from common.cli import warn_if_emulated
from common.data import Split, batches
from common.wandb_log import WandbLog

SAVE_EVERY = 180  # seconds: a SIGKILL loses at most this much of a long epoch
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed
ENDS_WITH = ("metrics.json", "samples.png", "loss.png")  # written at the end of a run
# The attributes of a Run that last.pt holds beside `parts` and the flags.
STATE = ("history", "stopped", "seconds_to_98", "step", "sums", "seconds", "wandb")


class Run:
    """args: the flags; a resumed run must have the same, except checkpoints.MAY_CHANGE. fixed:
    flags in MAY_CHANGE that may not change in this script. parts: objects with a state_dict,
    "model" and "stopping" among them."""

    def __init__(self, args: argparse.Namespace, *, fixed: set[str] = frozenset(), **parts) -> None:
        self.args, self.out, self.fixed, self.parts = args, Path(args.out), fixed, parts
        self.history: list[dict[str, Any]] = []
        self.stopped, self.seconds_to_98 = False, None
        # of the current epoch: completed steps, sums of the losses over images, seconds
        self.step, self.sums, self.seconds = 0, {}, 0.0
        self.wandb = secrets.token_hex(4)  # the id under which a resumed run logs
        self.log: WandbLog | None = None
        self.signal: int | None = None
        self.clock = 0.0

    @property
    def epoch(self) -> int:
        """The number of epochs that are complete."""
        return len(self.history)

    def start(self) -> None:
        """Restores last.pt under --resume, else removes the run that --overwrite replaces; starts
        wandb and defers signals: the first SIGINT, SIGTERM or SIGHUP ends the run after the current
        step, a second one immediately. Raises UserError for checkpoints that are damaged or of
        another run."""
        stale = ENDS_WITH
        if self.args.resume:
            self._restore()
        else:
            stale += ("last.pt", "best.pt", "history.jsonl")
        if distributed.rank() == 0:
            for name in stale:
                remove(self.out / name)
        if self.args.epochs == 0 and not self.args.resume:
            self._write()
        self.log = WandbLog(self.args, self.wandb)
        warn_if_emulated(self.args)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signal = number
        if distributed.world_size() == 1:  # torchrun repeats a signal that all ranks have had
            default_signals()

    def batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch, in an order that depends only on --seed and the epoch:
        images (B, 3, 32, 32) float32 in [0, 1], targets (B, 1, 28, 28). With a progress bar."""
        seed, epoch, rank = self.args.seed, self.epoch + 1, distributed.rank()
        steps = math.ceil(len(split.images) / self.args.batch_size)
        todo = batches(split, self.args.batch_size, seed, epoch, self.step)
        self.clock = time.perf_counter()
        for batch in tqdm(
            todo, f"epoch {epoch}", steps, initial=self.step, leave=False,
            disable=True if rank else None,  # None: on a terminal only
        ):  # fmt: skip
            if rank:  # each rank has other dropout masks, and saves no random state
                torch.manual_seed(hash((seed, epoch, self.step, rank)))
            yield batch
        self._stop_clock()

    def step_done(self, losses: dict[str, Tensor], count: int) -> None:
        """After each optimizer step. losses: means over `count` images, "loss" among them. Saves
        every SAVE_EVERY seconds; after a signal to any rank, saves and exits."""
        sums = {name: loss.detach().double() * count for name, loss in losses.items()}
        sums = distributed.total({"signal": bool(self.signal), **sums})
        interrupted = bool(sums.pop("signal"))
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.step += 1
        if interrupted or time.perf_counter() - self.clock > SAVE_EVERY:
            self._stop_clock()
            self._check_finite(self.epoch + 1, self.sums["loss"].item())
            self._write(epoch_is_over=False)
            if interrupted:
                self._exit()

    def _stop_clock(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.clock
        self.clock = time.perf_counter()

    def log_epoch(self, count: int, val: dict[str, float], lr: float) -> None:
        """Ends the epoch: one line of the history on stdout and in wandb. count: the training
        images; val: what `evaluate` returned; lr: at its end. Raises UserError where a loss
        is not finite, before anything is saved."""
        line = {"epoch": self.epoch + 1}
        line |= {f"train_{name}": value.item() / count for name, value in self.sums.items()}
        line |= {f"val_{name}": value for name, value in val.items()}
        line |= {"seconds": self.seconds, "lr": lr}
        self._check_finite(line["epoch"], line["train_loss"], line["val_loss"])
        self.history.append(line)
        if self.seconds_to_98 is None and line["val_accuracy_0.95"] >= 0.98:
            self.seconds_to_98 = sum(each["seconds"] for each in self.history)
        self.step, self.sums, self.seconds = 0, {}, 0.0
        rate = {"images_per_s": count / line["seconds"]}
        print(" ".join(f"{key}:{value:.6g}" for key, value in (line | rate).items()), flush=True)
        self.log.epoch(line)

    @staticmethod
    def _check_finite(epoch: int, *losses: float) -> None:
        if not all(map(math.isfinite, losses)):
            raise UserError(
                f"epoch {epoch}: the loss is no longer finite; start again with a lower --lr"
            )

    def save(self) -> None:
        """After each epoch: writes the files; exits if any rank received a signal."""
        self._write()
        if distributed.total({"signal": bool(self.signal)})["signal"]:
            self._exit()

    def _exit(self) -> None:
        if distributed.rank() == 0:
            command = distributed.resume_command()
            print(f"interrupted, saved; resume: {command}", file=sys.stderr)
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def load_best(self) -> None:
        """Loads best.pt into the model. Signals now end the process immediately."""
        default_signals()
        if distributed.rank() == 0:
            load_checkpoint(self.out / "best.pt", self.parts["model"])

    def _checkpoint(self) -> dict[str, Any]:
        """The content of last.pt."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {name: getattr(self, name) for name in STATE}
        return {**parts, **state, "args": vars(self.args), "random": random_state()}

    def _write(self, epoch_is_over: bool = True) -> None:
        """Writes the files, last.pt last, since --resume reads the state from it."""
        if distributed.rank() > 0:
            return
        last, best_epoch = self._checkpoint(), self.parts["stopping"].best_epoch
        if epoch_is_over and best_epoch == self.epoch:
            best = {"model": last["model"], "epoch": best_epoch}
            best |= {"args": last["args"], "wandb": last["wandb"]}
            write(self.out / "best.pt", lambda file: torch.save(best, file))
        self._write_history()
        write(self.out / "last.pt", lambda file: torch.save(last, file))

    def _write_history(self) -> None:
        lines = "".join(f"{json.dumps(line)}\n" for line in self.history)
        write_text(self.out / "history.jsonl", lines)

    def _restore(self) -> None:
        if (self.out / "best.pt").exists():
            best = load_checkpoint(self.out / "best.pt", self.parts["model"])
        elif self.args.epochs == 0:
            raise UserError(f"--epochs 0: {self.out} holds no complete epoch; resume with more")
        else:
            best = {"epoch": 0}
        path = self.out / "last.pt"
        saved = load_checkpoint(path, self.parts["model"])
        try:
            for key, value in self._checkpoint().items():
                if type(saved[key]) is not type(value) and key != "seconds_to_98":
                    raise TypeError(key)
                if key in ("args", "scheduler", "stopping") and saved[key].keys() != value.keys():
                    raise KeyError(key)
            check_flags(saved["args"], self.args, self.fixed)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            # a crash between the two writes leaves a best.pt of a later epoch: it is rewritten
            if best["epoch"] < self.parts["stopping"].best_epoch:
                raise UserError(f"{self.out / 'best.pt'} is missing or older than {path}")
            if best["epoch"] and best["wandb"] != saved["wandb"]:
                raise UserError(f"{self.out / 'best.pt'} is of another run than {path}")
            for name in STATE:
                setattr(self, name, saved[name])
            set_random_state(saved["random"])
            if distributed.rank() == 0:
                self._write_history()  # after a crash it may be truncated or older than last.pt
        except UserError:
            raise
        except Exception as error:  # a dict with other content raises many types
            raise UserError(f"{path} is not a checkpoint of this version") from error


def default_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP end the process immediately."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
