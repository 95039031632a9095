"""The results of a finished run: metrics.json, two figures and a table; and the description of the
machine, which is stored with all results."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from common import distributed, fast_cpu, figures, metrics
from common.checkpoints import write_text
from common.data import Data
from common.evaluate import predict
from common.run import Run


def write_report(run: Run, models: dict[str, nn.Module], loss_fn: nn.Module, data: Data) -> None:
    """Evaluates the models on the test set, which nothing before uses. models: name in titles ->
    model; the first is the run's own. Writes metrics.json, samples.png and loss.png and prints a
    table, on the first rank only."""
    if distributed.rank() > 0:
        return
    args, label = run.args, next(iter(models))
    outputs, terms, scores = {}, {}, {}
    for name, model in models.items():
        outputs[name], terms[name] = predict(model, loss_fn, data.test, args)
        scores[name] = metrics.score(outputs[name], data.test.targets)
    best_epoch = run.parts["stopping"].best_epoch
    result = {
        "script": Path(sys.argv[0]).name,
        "args": vars(args),
        "environment": environment(),
        "data": {
            "name": data.name,
            "test_name": data.test_name,
            **{name: len(getattr(data, name).images) for name in ("train", "val", "test")},
        },
        "fast_cpu": fast_cpu.status(),
        "epochs": run.epoch,
        "best_epoch": best_epoch,
        "stopped_early": run.stopped,
        "seconds": sum(line["seconds"] for line in run.history),
        "epoch_seconds": [line["seconds"] for line in run.history],
        "seconds_to_98": run.seconds_to_98,
        "test": scores.pop(label),
        "floor": metrics.floor(data.train.targets, data.test.targets),
        "ceiling": metrics.ceiling(data.train.targets, data.test.targets),
        "test_terms": terms.pop(label),
        "others": {name: scores[name] | {"terms": terms[name]} for name in scores},
    }
    write_text(run.out / "metrics.json", json.dumps(result, indent=2) + "\n")
    title = f"{label}, trained on {data.name}"
    pictures = [run.out / "samples.png"]
    figures.samples(pictures[0], data.test, outputs, f"{title}, tested on {data.test_name}")
    if run.history:
        pictures.append(run.out / "loss.png")
        figures.loss_curve(pictures[1], run.history, best_epoch, run.stopped, title)
    run.log.finish(result, pictures)
    print_table(result, label)


def print_table(result: dict[str, Any], label: str) -> None:
    """Prints net, floor and ceiling side by side, since an accuracy alone says little."""
    columns = {label: result["test"], **result["others"]}
    columns |= {"floor: constant gray": result["floor"], "ceiling: rank 128": result["ceiling"]}
    print(f"test on {result['data']['test']} images of {result['data']['test_name']}")
    print(" " * 14 + "".join(f"{name:>24}" for name in columns))
    for key in result["test"]:
        values = (column[key] for column in columns.values())
        cells = ("exact" if value is None else f"{value:.6g}" for value in values)
        print(f"{key:14}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"results in {result['args']['out']}")


def environment() -> dict[str, Any]:
    """Versions, hardware and command: stored with every result."""
    status = _git("status", "--porcelain")
    name, amx = processor()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
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


def _git(*command: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> tuple[str, bool]:
    """The processor's name, which platform.processor() does not give on Linux, and whether it has
    AMX."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", text)
    return name[1] if name else platform.processor() or platform.machine(), "amx_bf16" in text


# From the least to the most: what decides how fast a processor is here, by its flag in cpuinfo.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_bf16": "avx512-bf16",
    "amx_bf16": "amx",
    "asimd": "neon",
    "sve": "sve",
}


def hardware() -> dict[str, Any]:
    """More of the machine, kept with figures that are times: instruction sets, caches, memory."""
    flags = _read("/proc/cpuinfo").split()
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        caches[f"L{level}{kind[:1].lower() if kind != 'Unified' else ''}"] = size
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        memory = None
    return {
        "instruction_sets": [name for flag, name in INSTRUCTION_SETS.items() if flag in flags],
        "caches": caches,
        "memory_gb": memory,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "driver": _driver(),
    }


def machine_name(environment: dict[str, Any], gpu: bool) -> str:
    """The machine's name in file names: the GPU, or the processor and its widest instruction set.
    environment: with `hardware`'s keys."""
    name = environment["gpu"]
    if not gpu:
        processor = re.sub(r"\((R|TM)\)| Processor| CPU @.*", "", environment["processor"])
        name = " ".join([processor, *environment["instruction_sets"][-1:]])
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _driver() -> str | None:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
