"""What the tests of both training scripts share."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from common import figures, training


def run_script(script: ModuleType, *args, code: int = 0) -> None:
    """Runs a script's main as `python SCRIPT ARGS` does and expects its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        for drawing in ("samples", "loss_curve"):  # most of a short run's time
            patch.setattr(figures, drawing, lambda path, *args: path.touch())
        with pytest.raises(SystemExit) if code else nullcontext() as stopped:
            training.run(script.main)
    assert code == 0 or stopped.value.code == code


def interrupt_at(patch: pytest.MonkeyPatch, step: int, number: int) -> list:
    """Sends the signal `number` to this process in training step `step`. Returns a list with an
    item for each step that was begun."""
    begun, real = [], torch.nn.functional.mse_loss

    def mse_loss(*args, **settings):
        if torch.is_grad_enabled():  # a training step, not validation
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
    """The same history, and the same bits in everything that training goes on from."""
    assert history(first) == history(second)
    for name, keys in (
        ("best.pt", ("model", "epoch")),
        ("last.pt", ("model", "optimizer", "schedule", "stopping", "random")),
    ):
        states = [torch.load(out / name) for out in (first, second)]
        for key in keys:
            assert same(states[0][key], states[1][key]), f"{name}: {key}"
