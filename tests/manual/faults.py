"""Fault injection on real processes, and a fuzzer of every entry point, with counts.

python -m tests.manual.faults kill [20]       SIGKILL at random moments, then --resume
python -m tests.manual.faults fuzz [120] [arguments checkpoint operator images]
                                              seconds of invalid input per entry point
"""

import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import CIFAR10

import bench
import train_cnn
import train_fc
from common import UserError, checkpoints, cli, data, figures
from common.cifar10 import cifar10_on_disk
from common.transforms import fused_transform, matmul_transform
from tests.runs import ROOT, SMALL, assert_equal_runs, quiet_environment

SIX = [*SMALL, "--epochs", "6"]
RANDOM = ["--perceptual", "--vgg-weights", "random", "--vgg-size", "32"]
RUNS = {
    "fc": ["train_fc", *SIX],
    "cnn mse": ["train_cnn", *SIX, "--train-size", "150", "--batch-size", "16"],
    "cnn perceptual": ["train_cnn", *SIX, "--train-size", "40", "--batch-size", "8", *RANDOM],
}


# Frequent saves within the epoch give more states to kill in. A kill comes after "ready", which is
# printed when the imports are done.
START = """
import sys, {0}
from common import cli, run
run.SAVE_EVERY, cli.DRY_RUN["epochs"], start = 0.1, 6, run.Run.start
run.Run.start = lambda self: (print("ready", flush=True), start(self))[1]
sys.argv[0] = "{0}.py"
cli.run({0}.main)
"""


def kill(times: int) -> None:
    """Kills each run `times` times. Its result must equal that of an uninterrupted run."""
    numbers = random.Random(0)
    for name, (script, *flags) in RUNS.items():
        for precision in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                counts = kill_one([START.format(script), *flags, "--precision", precision],
                                  Path(folder), times, numbers)  # fmt: skip
            print(f"{name} {precision}: {times} kills, {counts}, all equal", flush=True)


def kill_one(code: list[str], folder: Path, times: int, numbers: random.Random) -> dict[str, int]:
    """Counts where the kills hit and how often the run completed, each time with equal results."""
    whole, cut = folder / "whole", folder / "cut"

    def start(out: Path) -> subprocess.Popen:
        resume = ["--resume"] if (out / "last.pt").exists() else []
        process = subprocess.Popen(
            [sys.executable, "-c", *code, "--out", str(out), *resume],
            cwd=ROOT, env=quiet_environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() in ("ready\n", ""), "not ready"
        return process

    process, begin = start(whole), time.monotonic()
    process.communicate()
    span = time.monotonic() - begin
    counts, kills = Counter(), 0
    while kills < times or counts["end"] == 0:
        process = start(cut)
        try:
            process.communicate(timeout=None if kills == times else numbers.uniform(0, span))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            state = torch.load(cut / "last.pt") if (cut / "last.pt").exists() else {}
            where = "in an epoch" if state.get("step") else "between epochs" if state else "unsaved"
            counts[where] += 1
            counts["temporary file"] += bool(list(cut.glob(".*")))
        else:
            assert process.returncode == 0
            assert_equal_runs(whole, cut)
            assert not list(cut.glob(".*"))
            counts["end"] += 1
            for path in cut.iterdir():
                path.unlink()
    return dict(counts)


def fuzz(seconds: float) -> None:
    """Accepts a result, one line with exit code 2, or a documented exception. Anything else is a
    crash and ends this script with its traceback."""
    figures.save = lambda figure, path: figures.plt.close(figure)  # most of a short run's time
    entries = {entry.__name__: entry for entry in (arguments, checkpoint, operator, images)}
    for entry in (entries[name] for name in sys.argv[3:] or entries):
        numbers, counts, end = random.Random(1), Counter(), time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < end:
                counts[entry(numbers, Path(folder))] += 1
        print(f"{entry.__name__}: {sum(counts.values())} tries, {dict(counts)}", flush=True)


INVALID = [
    "", "-1", "0", "1", "2", "3", "1e3", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 30, "x",
    "\udcff", "é", "/dev/null", "/proc/1", "a" * 300, "--", "-", "cuda", "cpu", "0x10", "1_0", "٣",
    "synthetic", "cifar10", "auto", "random", "fixed", "bf16", "window", "-h", " ",
]  # fmt: skip


def arguments(numbers: random.Random, folder: Path) -> str:
    """The flags of the three scripts; the benchmark ends before it measures."""
    script = numbers.choice([train_fc, train_cnn, bench])
    flags = ["data", "data-dir", "test-data", "train-size", "epochs", "batch-size", "lr", "seed",
             "patience", "min-delta", "stop-rule", "device", "precision", "out", "resume", "wandb",
             "init", "perceptual", "vgg-weights", "vgg-size", "flip", "runs", "images",
             "fc", "cnn", "peers", "no-such"]  # fmt: skip
    line = []
    for flag in numbers.sample(flags, numbers.randrange(1, 4)):
        line += [f"--{flag}", *([numbers.choice(INVALID)] if numbers.random() < 0.9 else [])]
    base = ["--data", "synthetic", "--data-dir", str(folder), "--out", str(folder / "run")]
    base += ["--dry-run", *(["--wandb", "disabled"] if script is not bench else [])]
    sys.argv = [f"{script.__name__}.py", *base, *line]
    bench.methods = lambda *args: sys.exit(0)
    torch.set_grad_enabled(True)  # the benchmark disables gradients
    os.chdir(folder)  # --out may be any name
    os.environ["VGG16_WEIGHTS"] = "random"
    CIFAR10.url = "http://127.0.0.1:9/"  # nothing listens there
    out, err = (io.TextIOWrapper(io.BytesIO(), errors=how) for how in ("strict", "replace"))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(script.main)
        return "ran"
    except SystemExit as stopped:
        end = stopped
    except BaseException:
        print(ascii(sys.argv))
        raise
    err.seek(0)
    text = err.read()
    assert end.code in (0, 2), (sys.argv, end.code, text)
    assert end.code == 0 or text.count("\n") == 1, (sys.argv, text)
    return "refused" if end.code else "help"


def checkpoint(numbers: random.Random, folder: Path) -> str:
    """Random bytes, other objects, and a real checkpoint cut, altered or with inserted bytes."""
    path, net = folder / "last.pt", nn.Linear(5, 3)
    whole = {"model": net.state_dict(), "args": {"seed": 0}, "history": [{"epoch": 1}]}
    kind = numbers.choice(["bytes", "object", "cut", "altered", "inserted"])
    if kind == "object":
        things = [None, 3, "x", [], {}, {"weight": 1}, {1: 2}, torch.zeros(2), net.weight.data,
                  {"weight": torch.zeros(3, 5), "bias": None}]  # fmt: skip
        torch.save(
            numbers.choice([{"model": numbers.choice(things)}, numbers.choice(things)]), path
        )
    else:
        torch.save(whole, path)
        content = bytearray(path.read_bytes())
        place = numbers.randrange(len(content))
        if kind == "bytes":
            content = numbers.randbytes(numbers.randrange(3000))
        elif kind == "cut":
            content = content[:place]
        elif kind == "inserted":
            content[place:place] = numbers.randbytes(numbers.randrange(1, 9))
        else:
            for _ in range(numbers.randrange(1, 5)):
                content[numbers.randrange(len(content))] = numbers.randrange(256)
        path.write_bytes(content)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        checkpoints.load_checkpoint(path, net)
    except UserError:
        return "refused"
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items()), kind
    return "loaded unchanged"


def operator(numbers: random.Random, folder: Path) -> str:
    """Arguments of fused_transform. Half of the tries are valid and must match matmul_transform."""
    pick = numbers.choice
    valid = numbers.random() < 0.5
    n, sizes = pick([0, 1, 2, 5]), [1, 2, 3, 7, 28, 32, 65]
    shape = [n, 3, pick(sizes), pick(sizes)]
    dtype = pick([torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    flips = [pick([True, False, torch.rand(n) < 0.5]) for _ in "hv"]
    size, out = (pick(sizes), pick(sizes)), None
    things = [None, 1.5, "x", [], (), torch.zeros(2), 2**40, -(2**70), object(), True, 0, -1]
    if not valid:
        shape = pick([shape, [pick([0, 1, 3, 4, 9]) for _ in range(pick([0, 1, 2, 3, 4, 5]))]])
        dtype = pick([dtype, torch.int64, torch.bool, torch.complex64, torch.int8])
        flips = [pick([flip, pick(things), torch.rand(3) < 0.5, torch.zeros(n)]) for flip in flips]
        size = pick([size, pick(things), (pick(things), 2), (0, 3), (2, -1), (1, 2, 3)])
        out = pick([None, pick(things), torch.empty(pick([shape, shape[:-3], []])),
                    torch.empty(*shape[:-3], 1, *shape[-2:])])  # fmt: skip
    images = torch.randint(0, 256, shape).to(dtype)
    if images.dim() > 1 and numbers.random() < 0.3:
        images = images.transpose(-1, -2).contiguous().transpose(-1, -2)
        images = images[..., :: pick([1, 2])]
    if not valid and numbers.random() < 0.2:
        images = pick([*things, images.to("meta"), images.to_sparse(), images.tolist()])
    try:
        result = fused_transform(images, size, hflip=flips[0], vflip=flips[1], out=out)
    except (RuntimeError, TypeError, ValueError) as error:
        if valid:
            raise AssertionError(f"{shape} {dtype} {size} {flips}") from error
        return "refused"
    except BaseException:
        print(images, size, flips, out)
        raise
    if not valid:
        return "ran"
    expected = matmul_transform(images.double(), size, hflip=False, vflip=False)
    for flip, dim in zip(flips, (3, 2), strict=True):
        flip = torch.as_tensor(flip).expand(n).view(n, 1, 1, 1)
        expected = torch.where(flip, expected.flip(dim), expected)
    scale = 255 if dtype == torch.uint8 else 1
    error = (result.double() * scale - expected).abs().max().item() if n else 0
    limit = {torch.float16: 0.2, torch.bfloat16: 1.1}.get(dtype, 1e-3)
    assert error < limit, (error, shape, dtype, size, flips)
    return "correct"


def images(numbers: random.Random, folder: Path) -> str:
    """CIFAR-10 on disk, as folder or archive, and the arguments of the loader."""
    root = folder / str(numbers.random())
    root.mkdir()
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)] + ["batches.meta"]
    for path in [root / CIFAR10.filename, *(root / CIFAR10.base_folder / name for name in names)]:
        if numbers.random() < 0.5:
            path.parent.mkdir(exist_ok=True)
            if numbers.random() < 0.1:
                path.mkdir()
            elif numbers.random() < 0.1:
                path.symlink_to(numbers.choice(["/nowhere", "/dev/null", str(path)]))
            else:
                path.write_bytes(numbers.randbytes(numbers.randrange(500)))
    if numbers.random() < 0.1:
        root = root / CIFAR10.filename
    name = "cifar10" if cifar10_on_disk(root) else numbers.choice(["auto", "synthetic"])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loaded = data.load(
                name, str(root), test_name=numbers.choice(["same", "synthetic"]),
                train_size=numbers.choice([None, 2, 3, 40, 50_001]) if name == "cifar10" else 5,
                test_size=3, seed=numbers.choice([0, 1, 2**31 - 1]), device=torch.device("cpu"),
            )  # fmt: skip
    except UserError:
        return "refused"
    assert len(loaded.test.images) == 3
    return f"loaded {loaded.name}"


if __name__ == "__main__":
    what, amount = {"kill": (kill, 20), "fuzz": (fuzz, 120)}[sys.argv[1]]
    what(type(amount)(sys.argv[2]) if len(sys.argv) > 2 else amount)
