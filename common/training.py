"""What both training scripts share: flags, the loop, resume, several processes, logs, the report.

A run's folder holds `last.pt` (everything that --resume needs), `best.pt` (the weights of the
lowest validation loss), `history.jsonl`, and at the end `metrics.json` and two pictures.
Under torchrun each process trains on its part of every batch, and the first alone writes and logs.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from common import UserError, figures, metrics
from common.checkpoints import load_checkpoint, lock, unlock, write, write_text
from common.data import Data, Split, batches, load, to_float
from common.early_stopping import EarlyStopping
from common.ranks import in_turn, is_lost, join, parallel, ranks, share, total

# --- flags -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line and not the whole usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind: type, low: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number >= low, or > low where `above`; whole ones in 32 bits."""

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
    """The flags that both scripts have; each adds its own. `doc`: the script's docstring."""
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


DRY_RUN = {"train_size": 320, "epochs": 2, "batch_size": 32}


def parse(p: Parser, out: Callable[[argparse.Namespace], str]) -> argparse.Namespace:
    """The flags, with the default of --out filled in. Seeds torch."""
    args = p.parse_args()
    if args.wandb not in ("online", "offline", "disabled"):  # argparse does not check defaults
        p.error(f"WANDB_MODE is {args.wandb!r}, not online, offline or disabled")
    if args.dry_run:
        for key, most in DRY_RUN.items():
            asked = getattr(args, key)
            setattr(args, key, most if asked is None else min(asked, most))
    args.out = args.out or out(args) + ("-dry-run" if args.dry_run else "")
    torch.manual_seed(args.seed)
    return args


def within_memory(function: Callable) -> Callable:
    """Turns a lack of memory in `function`, which takes the flags, into a UserError."""

    @functools.wraps(function)
    def wrapped(*arguments, **settings):
        try:
            return function(*arguments, **settings)
        except (MemoryError, RuntimeError) as error:
            # for the host's memory torch has no class of its own, only messages
            known = r"(?i)allocate|bad_alloc|alloc_failed|out of memory|storage size"
            if not re.search(known, str(error)) and not isinstance(error, MemoryError):
                raise
            args = next(each for each in arguments if isinstance(each, argparse.Namespace))
            half = max(1, args.batch_size // 2)
            raise UserError(
                f"no memory: try --batch-size {half} or a lower --train-size"
            ) from error

    return wrapped


@within_memory
def setup(args: argparse.Namespace) -> tuple[torch.device, Data]:
    """The device and the data, after every check that can be made before any work is done; --out
    is claimed, and under torchrun the processes are joined. Raises UserError."""
    args.device = devices(args.device)[-1]
    device = torch.device(args.device)
    join(args.device)
    if ranks()[0] == 0:
        lock(Path(args.out))
    else:
        sys.stdout = None  # print then does nothing
    last = Path(args.out, "last.pt")
    if args.resume and not last.exists():
        raise UserError(f"--resume: there is no {last}; leave --resume out to start")
    with in_turn():
        data = load(
            args.data,
            args.data_dir,
            test_name=args.test_data,
            train_size=args.train_size,
            test_size=args.train_size if args.dry_run else None,
            seed=args.seed,
            device=device,
        )
    args.data = data.name  # what "auto" found: a resumed run must find the same
    if args.batch_size > len(data.train.images):
        raise UserError(
            f"--batch-size {args.batch_size} is larger than the {len(data.train.images)} "
            f"training images"
        )
    return device, data


def devices(asked: str) -> list[str]:
    """What --device stands for, the fastest last: auto is the CPU, and CUDA where there is one.
    Raises UserError."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if asked != "auto":
        return [asked]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a user's mistake becomes one line and exit code 2."""
    with suppress(AttributeError):  # none, or a stand-in
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        print(f"another process ended or hangs; to go on: {resume_command()}", file=sys.stderr)
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the training, which has its own way
        sys.exit(128 + signal.SIGINT)
    finally:
        unlock()


def processor() -> tuple[str, bool]:
    """The processor's name, which platform.processor() does not know on Linux, and whether it has
    AMX, without which bfloat16 is slow."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"model name\s*: (.*)", text)
    return name[1] if name else platform.processor() or platform.machine(), "amx_bf16" in text


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: kept with every result."""

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command],
                capture_output=True, text=True, check=True,
            ).stdout.strip()  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return None

    status = git("status", "--porcelain")
    name, amx = processor()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "clean": None if status is None else status == "",
        "processor": name,
        "amx": amx,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


# --- the loop ----------------------------------------------------------------------------------


SAVE_EVERY = 180  # seconds: what a kill in the middle of a long epoch costs at most


class Interrupt:
    """The first SIGINT or SIGTERM is kept in `number`, for the loop to finish its step and save;
    a second one, or one after `end`, ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._keep)

    def _keep(self, number: int, frame: object) -> None:
        self.number = number
        if ranks()[1] == 1:  # torchrun sends on what all have had already, and waits 30 s itself
            self.end()

    def end(self) -> None:
        """Signals do what they do without this class."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 where --precision asks for it."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")


@torch.inference_mode()
def evaluate(
    model: nn.Module, loss_fn: nn.Module, split: Split, args: argparse.Namespace
) -> tuple[Tensor, dict[str, float]]:
    """Returns the outputs, (N, 1, 28, 28) float32, and the means of the loss and its terms."""
    model.eval()
    outputs, sums = [], {}
    for start in range(0, len(split.images), args.batch_size):
        images, targets = (part[start : start + args.batch_size] for part in split)
        with autocast(args):
            output = model(to_float(images))
            add_up(sums, terms(loss_fn(output, targets), loss_fn, len(images)))
        outputs.append(output.float())
    return torch.cat(outputs), {k: v.item() / len(split.images) for k, v in sums.items()}


def validate(
    model: nn.Module, loss_fn: nn.Module, split: Split, args: argparse.Namespace, group: Any
) -> dict[str, float]:
    """The means of the loss, its terms and the accuracy over `split`, each process with a part."""
    part, count = share(*split)
    outputs, means = evaluate(model, loss_fn, Split(*part), args)
    means["accuracy_0.95"] = metrics.accuracy(outputs, part[1], 0.95)
    weight = count / len(split.images)
    means = total({name: value * weight for name, value in means.items()}, group)
    return {name: float(value) for name, value in means.items()}


def terms(loss: Tensor, loss_fn: nn.Module, count: int) -> dict[str, Tensor]:
    """The loss and its terms, means over `count` images, as sums over them; on the device."""
    named = {"loss": loss, **getattr(loss_fn, "terms", {})}
    return {name: value.detach().double() * count for name, value in named.items()}


def add_up(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Adds `values` to `sums`."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


# A resumed run is the same run: only these flags may change on the way, and the number of
# processes, which is no flag.
FREE = {"data_dir", "test_data", "device", "out", "resume", "wandb"}


def check_flags(saved: dict[str, Any], args: argparse.Namespace, free: set[str]) -> None:
    """Raises UserError where a checkpoint's flags, but the `free` ones, are not this run's."""
    for key, value in vars(args).items():
        if key not in free and saved.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"--resume: that run had {flag} {saved.get(key)}, not {value}")


class Progress:
    """Everything that --resume goes on from: what is trained, and how far it has come."""

    def __init__(
        self, model: nn.Module, args: argparse.Namespace, groups: list[dict] | None = None
    ) -> None:
        self.args, self.out = args, Path(args.out)
        # 0.95 and not 0.999: the gradients shrink fast in the first epochs, and the second moment
        # with them; the FC net passes 98 % in fewer steps
        self.optimizer = torch.optim.Adam(
            groups or model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.3, patience=2, threshold=0.01
        )
        self.stopping = EarlyStopping(args.patience, args.min_delta, args.stop_rule)
        self.parts = {"model": model, "optimizer": self.optimizer}
        self.parts |= {"schedule": self.schedule, "stopping": self.stopping}
        self.state = {"history": [], "stopped": False, "seconds_to_98": None}
        self.state |= {"step": 0, "sums": {}, "seconds": 0.0}  # of the epoch under way
        self.state |= {"wandb": secrets.token_hex(4)}  # the id under which a resumed run goes on

    def checkpoint(self) -> dict[str, Any]:
        """The content of last.pt."""
        own = {key: part.state_dict() for key, part in self.parts.items()}
        return {**own, **self.state, "args": vars(self.args), "random": random_state()}

    def save(self, epoch_is_over: bool = True) -> None:
        """Writes the files, last.pt at the end, as it is what --resume goes by."""
        if ranks()[0] > 0:
            return
        last = self.checkpoint()
        if epoch_is_over and self.stopping.best_epoch == len(last["history"]):
            best = {"model": last["model"], "epoch": self.stopping.best_epoch, "args": last["args"]}
            write(self.out / "best.pt", lambda file: torch.save(best, file))
        self._write_history()
        write(self.out / "last.pt", lambda file: torch.save(last, file))

    def _write_history(self) -> None:
        lines = "".join(f"{json.dumps(line)}\n" for line in self.state["history"])
        write_text(self.out / "history.jsonl", lines)

    def resume(self, free: set[str]) -> None:
        """Takes everything from last.pt, a run with the same flags, but for the `free` ones.
        Raises UserError."""
        saved = load_checkpoint(self.out / "last.pt", self.parts["model"])
        try:
            for key, value in self.checkpoint().items():
                if type(saved[key]) is not type(value) and key != "seconds_to_98":
                    raise TypeError(key)
                if key in ("args", "schedule", "stopping") and saved[key].keys() != value.keys():
                    raise KeyError(key)
            check_flags(saved["args"], self.args, free)
            for key, part in self.parts.items():
                part.load_state_dict(saved[key])
            self.state = {key: saved[key] for key in self.state}
            set_random_state(saved["random"])
            if ranks()[0] == 0:
                self._write_history()  # a crash may have left it behind last.pt, or cut off
        except UserError:
            raise
        except Exception as error:  # a dict of someone else's can fail anywhere
            path = self.out / "last.pt"
            raise UserError(f"{path} is not a checkpoint of this version") from error


@within_memory
def fit(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Data,
    args: argparse.Namespace,
    log: "Log",
    decay: bool = False,
    groups: list[dict] | None = None,
) -> dict[str, Any]:
    """Trains `model` until early stopping or --epochs ends it, and leaves it with the weights of
    the lowest validation loss. Where `loss_fn` has `terms` (names to terms), each is logged.
    groups: the optimizer's parameter groups, where --lr, the first one's, does not suit all.
    decay: the learning rate falls in a line to zero at the end of --epochs, which suits a few
    epochs; else it falls by steps where the validation loss rests, which suits a run without end.

    Returns {"history", "stopped", "best_epoch", "seconds_to_98"}. Raises UserError where the
    loss stops being finite; the last good checkpoints stay.
    """
    progress = Progress(model, args, groups)
    if args.resume:
        progress.resume(FREE if decay else FREE | {"epochs"})
    elif args.epochs == 0:
        progress.save()
    state, stopping = progress.state, progress.stopping
    log.start(state["wandb"])
    trained, group = parallel(model)
    interrupt, stop = Interrupt(), False
    while len(state["history"]) < args.epochs and not state["stopped"]:
        model.train()
        stop = train_epoch(progress, trained, loss_fn, data.train, group, interrupt, decay)
        if stop:
            break
        val = validate(model, loss_fn, data.val, args, group)
        lr = progress.optimizer.param_groups[0]["lr"]  # of the last step
        line = end_epoch(state, len(data.train.images), val, lr)
        state["stopped"] = stopping.step(line["val_loss"])
        if not decay:
            progress.schedule.step(line["val_loss"])
        log.epoch(line)
        progress.save()
    if stop or interrupt.number:
        if ranks()[0] == 0:
            print(f"interrupted, saved; to go on: {resume_command()}", file=sys.stderr)
        sys.exit(128 + (interrupt.number or signal.SIGTERM))
    interrupt.end()
    if ranks()[0] == 0:
        load_checkpoint(Path(args.out, "best.pt"), model)
    return {**state, "best_epoch": stopping.best_epoch}


def train_epoch(
    progress: Progress,
    trained: nn.Module,
    loss_fn: nn.Module,
    split: Split,
    group: Any,
    interrupt: Interrupt,
    decay: bool,
) -> bool:
    """An epoch, or what is left of it; True where a signal, to any process, has ended it early."""
    args, state, optimizer = progress.args, progress.state, progress.optimizer
    epoch, (rank, world) = len(state["history"]) + 1, ranks()
    steps = math.ceil(len(split.images) / args.batch_size)
    start, stop = time.perf_counter(), False
    todo = batches(split, args.batch_size, args.seed, epoch, state["step"])
    for batch in tqdm(
        todo, f"epoch {epoch}", steps, initial=state["step"], leave=False,
        disable=True if rank else None,
    ):  # fmt: skip
        if decay:
            done = (epoch - 1 + state["step"] / steps) / args.epochs
            optimizer.param_groups[0]["lr"] = args.lr * (1 - done)
        if rank:  # dropout of its own, with nothing to save
            torch.manual_seed(hash((args.seed, epoch, state["step"], rank)))
        (images, targets), count = share(*batch)
        optimizer.zero_grad()
        with autocast(args):
            loss = loss_fn(trained(images), targets)
        # torch takes the mean of the gradients, wanted is the mean over all images
        loss.backward(loss.new_tensor(count * world / len(batch[0])) if group else None)
        optimizer.step()
        values = {"stop": bool(interrupt.number), **terms(loss, loss_fn, count)}
        values = total(values, group)
        stop = bool(values.pop("stop"))
        add_up(state["sums"], values)
        state["step"] += 1
        if stop or time.perf_counter() - start > SAVE_EVERY:
            synchronize(args)
            state["seconds"] += time.perf_counter() - start
            check_finite(epoch, state["sums"]["loss"].item())
            progress.save(epoch_is_over=False)
            start = time.perf_counter()
            if stop:
                return True
    synchronize(args)
    state["seconds"] += time.perf_counter() - start
    return False


def end_epoch(
    state: dict[str, Any], count: int, val: dict[str, float], lr: float
) -> dict[str, Any]:
    """Closes the epoch of `count` images in `state`: appends its line to the history and prints
    it. `val` is what `validate` gave."""
    history = state["history"]
    line = {"epoch": len(history) + 1}
    line |= {f"train_{name}": value.item() / count for name, value in state["sums"].items()}
    line |= {f"val_{name}": value for name, value in val.items()}
    line |= {"seconds": state["seconds"], "lr": lr}
    check_finite(line["epoch"], line["train_loss"], line["val_loss"])
    history.append(line)
    if state["seconds_to_98"] is None and line["val_accuracy_0.95"] >= 0.98:
        state["seconds_to_98"] = sum(each["seconds"] for each in history)
    state.update(step=0, sums={}, seconds=0.0)
    rate = {"images_per_s": count / line["seconds"]}
    print(" ".join(f"{key}:{value:.6g}" for key, value in (line | rate).items()), flush=True)
    return line


def check_finite(epoch: int, *losses: float) -> None:
    """Raises UserError before such a state is saved over the last good one."""
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"epoch {epoch}: the loss is no longer finite; start again with a lower --lr"
        )


def synchronize(args: argparse.Namespace) -> None:
    """Waits for the GPU, so that the clock reads what was done and not what was asked for."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, on the host and on the GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Goes on where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def resume_command() -> str:
    """The command of this run with --resume."""
    world = ranks()[1]
    several = ["torchrun", "--standalone", f"--nproc_per_node={world}"]
    resume = [] if "--resume" in sys.argv else ["--resume"]
    return shlex.join([*(several if world > 1 else ["python"]), *sys.argv, *resume])


# --- logs and the report -----------------------------------------------------------------------


class Log:
    """wandb where it is installed and works; it asks nothing and never ends a run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.run = args, None

    def start(self, identity: str) -> None:
        """Begins the run of this id, or goes on with it; only in the first process."""
        if self.args.wandb != "disabled" and ranks()[0] == 0:
            self._try(lambda: self._start(self.args, identity))

    def _start(self, args: argparse.Namespace, identity: str) -> None:
        import wandb

        mode = args.wandb
        if mode == "online" and not wandb.login(prompt=False):
            print("wandb: not logged in; offline (`wandb sync` uploads the run later)")
            mode = "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "learned-transforms"),
            name=Path(args.out).name,
            dir=os.environ.get("WANDB_DIR", args.out),
            mode=mode,
            config=vars(args),
            id=identity,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the run is worth more
            print(f"wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
            self.run = None

    def epoch(self, line: dict[str, Any]) -> None:
        """One epoch's line of the history: the loss curves."""
        if self.run:
            self._try(lambda: self.run.log(line, step=line["epoch"]))

    def finish(self, result: dict[str, Any], pictures: list[Path]) -> None:
        """The final figures and the pictures."""

        def send() -> None:
            import wandb

            self.run.summary.update({key: result[key] for key in ("test", "floor", "ceiling")})
            self.run.log({picture.stem: wandb.Image(str(picture)) for picture in pictures})
            self.run.finish()

        if self.run:
            self._try(send)


@within_memory
def report(
    model: nn.Module,
    loss_fn: nn.Module,
    data: Data,
    args: argparse.Namespace,
    state: dict[str, Any],
    log: Log,
    label: str,
    others: dict[str, nn.Module] | None = None,
) -> None:
    """The test set, touched here for the first time: `metrics.json`, the pictures, a table.
    `label` names the model in titles; `state` is what `fit` returned; `others` are trained models
    to show beside it. The first process does it all."""
    if ranks()[0] > 0:
        return
    out, history = Path(args.out), state["history"]
    outputs, terms, scores = {}, {}, {}
    for name, each in {label: model, **(others or {})}.items():
        outputs[name], terms[name] = evaluate(each, loss_fn, data.test, args)
        scores[name] = metrics.score(outputs[name], data.test.targets)
    result = {
        "script": Path(sys.argv[0]).name,
        "args": vars(args),
        "environment": environment(),
        "data": {
            "name": data.name,
            "test_name": data.test_name,
            **{name: len(getattr(data, name).images) for name in ("train", "val", "test")},
        },
        "epochs": len(history),
        "best_epoch": state["best_epoch"],
        "stopped_early": state["stopped"],
        "seconds": sum(line["seconds"] for line in history),
        "seconds_to_98": state["seconds_to_98"],
        "test": scores[label],
        "floor": metrics.floor(data.train.targets, data.test.targets),
        "ceiling": metrics.ceiling(data.train.targets, data.test.targets),
        "test_terms": terms.pop(label),
        "others": {name: scores[name] | {"terms": terms[name]} for name in terms},
    }
    write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
    title = f"{label}, trained on {data.name}"
    pictures = [out / "samples.png"]
    figures.samples(pictures[0], data.test, outputs, f"{title}, tested on {data.test_name}")
    if history:
        pictures.append(out / "loss.png")
        figures.loss_curve(pictures[1], history, state["best_epoch"], state["stopped"], title)
    else:
        (out / "loss.png").unlink(missing_ok=True)  # of an older run
    log.finish(result, pictures)
    print_table(result, label)


def print_table(result: dict[str, Any], label: str) -> None:
    """Net, floor and ceiling side by side: an accuracy alone says little."""
    columns = {label: result["test"], **result["others"]}
    columns |= {"floor: constant gray": result["floor"], "ceiling: rank 128": result["ceiling"]}
    print(f"test on {result['data']['test']} images of {result['data']['test_name']}")
    print(" " * 14 + "".join(f"{name:>24}" for name in columns))
    for key in result["test"]:
        values = (column[key] for column in columns.values())
        cells = ("exact" if value is None else f"{value:.6g}" for value in values)
        print(f"{key:14}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"results in {result['args']['out']}")
