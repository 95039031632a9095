"""Helpers that several test files share."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from common import cli, figures

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--data", "synthetic", "--dry-run"]  # the flags of a run that takes a second


def run_script(script: ModuleType, *args, code: int = 0) -> None:
    """Runs a script's main as `python SCRIPT ARGS` does and expects its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        for drawing in ("samples", "loss_curve"):  # most of a short run's time
            patch.setattr(figures, drawing, lambda path, *args: path.touch())
        with pytest.raises(SystemExit) if code else nullcontext() as stopped:
            cli.run(script.main)
    assert code == 0 or stopped.value.code == code


def refused(capsys: pytest.CaptureFixture, script: ModuleType, *args) -> str:
    """Runs a script that must exit with code 2 and one line on stderr. Returns the line."""
    run_script(script, *args, code=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def torchvision_chain(
    images: Tensor, size: tuple[int, int], hflip: bool = True, vflip: bool = True
) -> Tensor:
    """The report's chain by torchvision: images (..., 3, H, W), uint8 or float, to
    (..., 1, *size)."""
    if images.dtype == torch.uint8:
        images = F.to_dtype(images, torch.float32, scale=True)
    out = F.rgb_to_grayscale(F.resize(images, list(size), antialias=True))
    out = F.horizontal_flip(out) if hflip else out
    return F.vertical_flip(out) if vflip else out


def interrupt_at(patch: pytest.MonkeyPatch, step: int, number: int) -> list:
    """Sends the signal `number` to this process in training step `step`. Returns a list that gets
    one item for each step that starts."""
    begun, real = [], torch.nn.functional.mse_loss

    def mse_loss(*args, **settings):
        # a training step, not validation; of the images, not of the VGG's maps
        if torch.is_grad_enabled() and args[0].shape[1:] == (1, 28, 28):
            begun.append(1)
            if len(begun) == step:
                os.kill(os.getpid(), number)
        return real(*args, **settings)

    patch.setattr(torch.nn.functional, "mse_loss", mse_loss)
    return begun


def same(first, second) -> bool:
    """Whether two nested structures of tensors and plain types hold the same bits."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def history(out: Path) -> list[dict]:
    """The lines of history.jsonl without their seconds."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_equal_runs(first: Path, second: Path) -> None:
    """The same history, and the same bits in everything that a resumed run reads."""
    assert history(first) == history(second)
    for name, keys in (
        ("best.pt", ("model", "epoch")),
        ("last.pt", ("model", "optimizer", "scheduler", "stopping", "random")),
    ):
        states = [torch.load(out / name) for out in (first, second)]
        assert states[0].keys() == states[1].keys()
        for key in states[0].keys() & set(keys):
            assert same(states[0][key], states[1][key]), f"{name}: {key}"


def start_ranks(code: str, *args, world: int = 2) -> list[subprocess.Popen]:
    """Starts `world` ranks as torchrun does, without its supervisor; each runs `code` with `args`
    as its flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            env=quiet_environment(RANK=rank, LOCAL_RANK=rank, **places),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def quiet_environment(**more) -> dict[str, str]:
    """The environment of a subprocess: no wandb, and one thread, so that two processes do not wait
    for each other."""
    settings = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": 1, **more}
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


def assert_close_runs(first: Path, second: Path) -> None:
    """The same training except for the order of sums: all values but the times within 1e-5."""
    pairs = list(zip(history(first), history(second), strict=True))
    assert all(one == pytest.approx(two, abs=1e-5) for one, two in pairs)
    for name in ("best.pt", "last.pt"):
        one, two = (torch.load(out / name)["model"] for out in (first, second))
        assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-5) for key in one)
