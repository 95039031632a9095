"""A GPU for tests without one: fake tensors on `cuda`, which have shapes and no values, stand-ins
for what needs a driver, and a watch on what waits for the device within a training step."""

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import distributed
from common.run import Run

WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


class Event:
    """A stand-in for torch.cuda.Event: its time may be read after a synchronisation."""

    recorded: list["Event"] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.reached, self.at = enable_timing, False, 0.0

    def record(self) -> None:
        self.reached, self.at = False, time.perf_counter()
        self.recorded.append(self)

    def elapsed_time(self, end: "Event") -> float:
        for event in (self, end):
            assert event.timed
            assert event.reached
        return 1e3 * (end.at - self.at)


def synchronize(device=None) -> None:
    for event in Event.recorded:
        event.reached = True
    Event.recorded.clear()


def apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, behind `to` and its like, which torch does not have for fake tensors."""
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, x in tensors.items():
                if x is not None:
                    new = function(x.detach())
                    tensors[name] = nn.Parameter(new) if isinstance(x, nn.Parameter) else new
    return module


@contextmanager
def fake_cuda():
    """Within it --device is cuda and all tensors are fake. A tensor left on the CPU, or the value
    of one, is an error."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch, "compile", lambda function, **options: function)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(distributed, "devices", lambda asked: ["cuda"])
        patch.setattr(nn.Module, "_apply", apply)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
        yield mode


class Watch(TorchDispatchMode):
    """Fails where the host waits for the device between the first batch of an epoch and the end of
    its last step. steps: how many it saw; copies: what went to the device meanwhile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.training, self.steps, self.copies = False, 0, 0
        batches, step_done = Run.batches, Run.step_done

        def watched(run, split):
            self.training = True
            yield from batches(run, split)
            self.training = False

        def counted(*args):
            step_done(*args)
            self.steps += 1

        patch.setattr(Run, "batches", watched)
        patch.setattr(Run, "step_done", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.training:
            name = str(function).rpartition(".")[0]
            assert name not in WAITS, f"{name} in a step"
            if name in ("aten._to_copy", "aten.copy_"):
                source = args[-1] if name == "aten.copy_" else args[0]
                if source.device.type != result.device.type:
                    assert result.device.type != "cpu", "a copy to the host in a step"
                    self.copies += 1
        return result
