"""The Python of the GPU paths without a GPU. The scripts themselves run on `cuda` with fake tensors
(backward(), which needs a CUDA context, is replaced), and on `meta` with their own backward."""

import gc
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import train_cnn
import train_fc
from common import UserError, bench_figures, cases, checkpoints, cli, distributed, photos, report
from common.models import FullyConnected
from common.perceptual import PerceptualLoss
from common.run import Run
from common.transforms import reference_transform
from tests.fake_gpu import Watch, fake_cuda
from tests.runs import SMALL, run_script

EPOCH = [*SMALL, "--train-size", 40, "--batch-size", 16, "--epochs", 1]  # steps of 16, 16 and 4
RANDOM = ["--perceptual", "--vgg-weights", "random"]
TRAININGS = [
    (train_fc, []),
    (train_fc, ["--model", "linear", "--precision", "bf16"]),
    (train_fc, ["--model", "separable"]),
    (train_cnn, []),
    (train_cnn, ["--flip", "fixed", "--precision", "bf16", *RANDOM]),
]
NAMES = ["fc", "linear", "separable", "cnn", "perceptual"]


@pytest.fixture
def watch(monkeypatch):
    """Without checkpoints: a fake tensor has no value to save."""
    for name in ("_write", "load_best"):
        monkeypatch.setattr(Run, name, lambda *args, **settings: None)
    return Watch(monkeypatch)


@pytest.fixture
def no_backward(monkeypatch):
    """Every weight gets a gradient, and outside of a step every value is 1."""
    weights, wrap = [], distributed.wrap

    def wrapped(model):
        weights.extend(model.parameters())
        return wrap(model)

    def backward(loss):
        assert loss.requires_grad
        for weight in weights:
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(distributed, "wrap", wrapped)
    monkeypatch.setattr(torch.Tensor, "backward", backward)


def values(monkeypatch, watch):
    """Outside of a step every value is 1."""

    def item(tensor):
        assert not watch.training, "item() in a step"
        return 1.0

    monkeypatch.setattr(torch.Tensor, "item", item)


@pytest.mark.parametrize(("script", "flags"), TRAININGS, ids=NAMES)
def test_a_run_on_fake_cuda(script, flags, watch, no_backward, monkeypatch, tmp_path):
    values(monkeypatch, watch)
    with fake_cuda(), watch:
        run_script(script, *EPOCH, *flags, "--out", tmp_path)
    assert (watch.steps, watch.copies) == (3, 1)  # the epoch's order
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert (result["args"]["device"], result["test"]["mse"]) == ("cuda", 1)


@pytest.mark.parametrize(("script", "flags"), TRAININGS, ids=NAMES)
def test_an_epoch_on_meta(script, flags, watch, monkeypatch, tmp_path):
    """With the real backward. Adam does not know that it can run there."""
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args: None)
    monkeypatch.setattr(distributed, "init", lambda args: torch.device("meta"))
    reached = []

    def evaluate(*args):
        reached.append(args)
        raise UserError("the epoch is over")

    monkeypatch.setattr(script, "evaluate", evaluate)
    with watch:
        run_script(script, *EPOCH, *flags, "--device", "cpu", "--out", tmp_path, code=2)
    assert reached
    assert (watch.steps, watch.copies) == (3, 1)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.item(), lambda x: x.cpu(), lambda x: bool(x > 0), lambda x: x.nonzero()],
    ids=["item", "cpu", "bool", "nonzero"],
)
def test_a_step_that_waits_is_found(wait, watch, no_backward, monkeypatch, tmp_path):
    values(monkeypatch, watch)
    monkeypatch.setattr(distributed, "total", lambda sums: wait(sums["loss"]) and sums)
    with (
        fake_cuda(),
        watch,
        pytest.raises(Exception, match=r"in a step|_local_scalar_dense|nonzero"),
    ):
        run_script(train_fc, *EPOCH, "--out", tmp_path)
    assert (watch.training, watch.steps) == (True, 0)


# --- several ranks -------------------------------------------------------------------------------


def test_sums_over_ranks_stay_on_their_device(watch):
    """In a step the losses are summed by NCCL (here by a backend that does nothing), and the signal
    by gloo."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # the backend "fake"
    dist.init_process_group("cpu:gloo,cuda:fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distributed.wrap(FullyConnected())  # makes the group
        watch.training = True
        with fake_cuda(), watch:
            loss = torch.ones((), device="cuda")
            sums = distributed.total({"signal": True, "loss": loss, "mse": loss})
        places = [(name, x.device.type, x.dtype) for name, x in sums.items()]
        wanted = {"signal": "cpu", "loss": "cuda", "mse": "cuda"}
        assert places == [(*pair, torch.float64) for pair in wanted.items()]
    finally:
        dist.destroy_process_group()
        distributed.wrap(FullyConnected())


def test_each_rank_takes_its_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: calls.append(name))
    for name, value in {"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(device="auto")
    assert (distributed.init(args).type, args.device) == ("cuda", "cuda")
    assert calls == [1, "cpu:gloo,cuda:nccl"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most 2, one for each GPU"):
        distributed.init(args)


def test_the_random_state_of_the_gpu_is_saved(monkeypatch):
    kept = [torch.arange(16, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept[-1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", kept.append)
    state = checkpoints.random_state()
    checkpoints.set_random_state(state)
    assert len(kept) == 2
    assert kept[0] is kept[1]


# --- the formats that a GPU is fast in -----------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_vgg_on_a_gpu_has_the_dtype_and_channels_last(precision):
    """cuDNN takes maps in the format of the weights, and gives its results in it. What it would
    give cannot be asked here: which library runs a bfloat16 convolution depends on the GPU."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    found = []

    class Convolutions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.convolution.default:
                images, weight, bias = args[:3]
                last = weight.is_contiguous(memory_format=torch.channels_last)
                found.append((last, *(x.dtype for x in (images, weight, bias, result))))
            return result

    with fake_cuda(), Convolutions():
        loss_fn = PerceptualLoss("random", 64).to("cuda")
        output, target = (torch.rand(2, 1, 28, 28, device="cuda") for _ in range(2))
        with cli.autocast(SimpleNamespace(device="cuda", precision=precision)):
            loss = loss_fn(output.requires_grad_(), target)
        assert [x.dtype for x in (loss, *loss_fn.terms.values())] == 7 * [torch.float32]
    assert found == 2 * 13 * [(True, *4 * [dtype])]


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_on_fake_cuda(monkeypatch, tmp_path):
    """Every row, timed with stand-ins for CUDA's events; nothing is said of the results, which have
    no values. The operator's own tests are elsewhere: in its place stands torchvision."""

    def fused(batch, out=None):
        result = reference_transform(batch)
        return result if out is None else out.copy_(result)

    real, environment = photos.photographs, report.environment
    for module in (bench, cases):
        monkeypatch.setattr(module, "fused_transform", fused)
    for module in (bench, photos):
        monkeypatch.setattr(module, "against", lambda reference: lambda case, result: ({}, ""))
    monkeypatch.setattr(photos, "CHAINS", {"eval": photos.CHAINS["eval"]})
    monkeypatch.setattr(photos, "fuse", lambda chain: chain)
    monkeypatch.setattr(photos, "photographs", lambda count: real(1))
    monkeypatch.setattr(report, "environment", lambda: environment() | {"gpu": "NVIDIA H100"})
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1)  # the loader draws a seed
    monkeypatch.setattr(gc, "collect", lambda: None)
    for chart in ("bars", "growth", "chains"):
        monkeypatch.setattr(bench_figures, chart, lambda path, *args: path.touch())
    few = ["--images", 4, "--batch-size", 2, "--runs", 1, "--data", "synthetic", "--dry-run"]
    monkeypatch.chdir(tmp_path)  # without checkpoints
    with fake_cuda():
        run_script(bench, *few, "--out", tmp_path)
    result = json.loads((tmp_path / "bench-nvidia-h100.json").read_text())
    rows = result["rows"] + result["chains"]
    assert [(row["name"], row["note"]) for row in rows if not row["median_s"]] == []
    assert {row["device"] for row in rows} == {"cuda"}
    for row in rows:  # the report's clock is the host's
        assert (row["host_us_per_call"] is None) == (row["protocol"] == "report")
    assert {row["synchronised"] for row in rows} == {True, False}
