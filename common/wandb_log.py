"""Logging to wandb, if it is installed and works. It never prompts and never ends a run."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import distributed


class WandbLog:
    """Logs one run on the first rank; a resumed run keeps its id."""

    def __init__(self, args: argparse.Namespace, run_id: str) -> None:
        self.run = None
        if args.wandb != "disabled" and distributed.rank() == 0:
            self._try(lambda: self._init(args, run_id))

    def _init(self, args: argparse.Namespace, run_id: str) -> None:
        import wandb

        logging.raiseExceptions = False  # on a full disk, a traceback for each line of wandb's log

        def start(mode: str) -> None:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "learned-transforms"),
                name=Path(args.out).name,
                dir=os.environ.get("WANDB_DIR", args.out),
                mode=mode,
                config=vars(args),
                id=run_id,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )

        if args.wandb == "online":
            try:
                if not wandb.login(prompt=False):
                    raise RuntimeError("not logged in")
                return start("online")
            except Exception as error:  # of any type: the run can be uploaded later
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                print(f"wandb: {why}; offline, upload with `wandb sync`", file=sys.stderr)
        start("offline")

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of any type: logging must not end the run
            print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
            self.run = None

    def epoch(self, line: dict[str, Any]) -> None:
        """Logs one line of the history."""
        if self.run:
            self._try(lambda: self.run.log(line, step=line["epoch"]))

    def finish(self, result: dict[str, Any], pictures: list[Path]) -> None:
        """Logs the final scores and figures."""

        def send() -> None:
            import wandb

            self.run.summary.update({key: result[key] for key in ("test", "floor", "ceiling")})
            self.run.log({picture.stem: wandb.Image(str(picture)) for picture in pictures})
            self.run.finish()

        if self.run:
            self._try(send)
