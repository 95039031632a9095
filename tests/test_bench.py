"""bench.py as a user runs it, on few images and without torch.compile, which takes seconds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
from common import figures
from common.transforms import reference_transform
from tests.runs import refused, run_script

FEW = ["--data", "synthetic", "--images", 20, "--batch-size", 10, "--device", "cpu"]
NAMES = {
    *("torchvision sequential", "torchvision batched", "matmul", "matmul compiled", "gemm"),
    *("fused", "fused uint8", "copy", "fc", "fc bf16", "cnn", "cnn bf16"),
}
DOCUMENTED = {
    *("name", "device", "protocol", "dtype", "batch", "images", "runs", "mean_s", "median_s"),
    *("iqr_s", "min_s", "images_per_s", "speedup", "max_abs_error", "accuracy_0.95", "note"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A short benchmark in a folder without checkpoints."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(bench, "GROWTH", (1, 10))
    monkeypatch.setattr(bench, "GROWTH_BUDGET_S", 0)
    monkeypatch.setattr(bench, "LEAST_RUNS", 1)
    monkeypatch.setattr(bench.cli, "bfloat16_factor", lambda: 1.0)
    for chart in ("bench_bars", "bench_growth"):
        monkeypatch.setattr(figures, chart, lambda path, *args: path.touch())
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_grad_enabled(True)


def run(*flags, code=0):
    """Returns the JSON, and its rows by protocol and name (of the larger batch)."""
    run_script(bench, *FEW, "--runs", 3, *flags, "--out", "out", code=code)
    if code:
        return None
    (path,) = Path("out").glob("bench-*.json")
    result = json.loads(path.read_text())
    return result, {(row["protocol"], row["name"]): row for row in result["rows"]}


def test_run_writes_documented_files(capsys):
    result, rows = run()
    assert {path.suffix for path in Path("out").iterdir()} == {".json", ".md", ".png"}
    assert {name for protocol, name in rows if protocol == "tensor"} >= NAMES
    assert {name for protocol, name in rows if protocol == "report"} >= {bench.BASE, "fc", "cnn"}
    for row in result["rows"]:
        assert row.keys() >= DOCUMENTED
        assert row["runs"] == 3
        assert row["min_s"] <= row["median_s"]
        assert row["images_per_s"] == pytest.approx(20 / row["median_s"])
    assert rows["tensor", bench.BASE]["speedup"] == 1
    assert rows["tensor", "fused"]["max_abs_error"] < 1e-6
    assert rows["tensor", "fused"]["note"] == "into out="
    assert rows["tensor", "fc"]["note"] == "untrained"
    assert {row["batch"] for row in result["growth"]} == {1, 10}
    assert all(len(line) <= 120 for line in capsys.readouterr().out.splitlines()[2:])


def test_charts(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real chart functions
    row = {"name": "fused", "device": "cpu", "protocol": "report", "batch": 10, "us_per_image": 1.0}
    row |= {"median_s": 1.0, "peer": False}
    shown = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: shown.append(figure))
    failed = row | {"name": "cnn", "median_s": None, "us_per_image": None}
    quick = row | {"protocol": "tensor", "us_per_image": 0.1}
    report = {("cpu", "fc"): 0.13, ("cuda", "fc"): 9.0}
    figures.bench_bars(tmp_path, [row, failed, quick], report, "title")
    labels = [text.get_text() for text in shown[0].axes[0].get_yticklabels()]
    assert labels == ["fc, by the report", "fused, 10 a batch"]
    assert all(axis.get_xscale() == "log" for axis in shown[0].axes)
    assert all(axis.get_xlim()[0] < 0.1 for axis in shown[0].axes)  # no bar is cut off
    figures.bench_growth(tmp_path, [row, row | {"batch": 100}], "title")
    assert len(shown[1].axes[0].lines[0].get_xdata()) == 2


def slower(monkeypatch, name, step):
    """Runs `step` after the method's own step."""

    def methods(*args):
        found = real(*args)
        for method in found:
            if method.name == name:
                method.step = lambda batch, own=method.step: step(own(batch))
        return found

    real = bench.methods
    monkeypatch.setattr(bench, "methods", methods)


def test_slowdown_changes_only_its_own_row(monkeypatch):
    # a fake clock advances by 1 ms per reading, so that load on the machine does not matter
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return now[0]

    clock = SimpleNamespace(perf_counter=lambda: wait(0.001))
    monkeypatch.setattr(bench, "time", clock)
    _, before = run()
    slower(monkeypatch, "matmul", lambda result: (wait(0.005), result)[1])
    _, after = run()
    assert before.keys() == after.keys()
    for key in before:
        added = 2 * 0.005 if key == ("tensor", "matmul") else 0  # two batches
        assert after[key]["median_s"] - before[key]["median_s"] == pytest.approx(added, abs=1e-9)


def test_wrong_result_is_not_timed(monkeypatch, capsys):
    def unflipped(images, out=None):
        return reference_transform(images).flip(-1)

    monkeypatch.setattr(bench, "fused_transform", unflipped)
    _, rows = run()
    for protocol in ("report", "tensor"):
        row = rows[protocol, "fused"]
        assert (row["median_s"], row["runs"]) == (None, 0)
        assert row["max_abs_error"] > 0.1
        assert row["note"].startswith("wrong")
    assert rows["tensor", "matmul"]["median_s"] > 0
    out = capsys.readouterr().out
    assert any(line.startswith("fused ") and "no time" in line for line in out.splitlines())


def test_emulated_bfloat16_gets_no_time(monkeypatch):
    monkeypatch.setattr(bench.cli, "bfloat16_factor", lambda: 25.0)
    _, rows = run()
    for name in ("fc bf16", "cnn bf16"):
        assert rows["tensor", name]["median_s"] is None
        assert rows["report", name]["note"].endswith("emulated, 25 times slower")
    assert rows["tensor", "fc"]["median_s"] > 0


def test_a_row_that_raises_costs_only_itself(monkeypatch):
    def fail(result):
        raise RuntimeError("no compiler")

    slower(monkeypatch, "matmul compiled", fail)
    _, rows = run()
    assert rows["tensor", "matmul compiled"]["note"] == "failed: RuntimeError: no compiler"
    assert rows["tensor", "matmul compiled"]["median_s"] is None
    assert rows["tensor", "matmul"]["median_s"] > 0


def test_slow_row_runs_fewer_interleaved_passes(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def row(name, seconds):
        def step(item):
            order.append(name)
            now[0] += seconds

        return bench.Row(name, "cpu", "tensor", "", 1, 1, [0], step, "part")

    slow, fast = row("slow", 0.02), row("fast", 0.002)
    order.clear()
    bench.measure([slow, fast], 12, 0.13)
    assert len(slow.times) == slow.runs == 6
    assert len(fast.times) == 12
    turns = [i for i, name in enumerate(order) if name == "slow"]
    assert turns[-1] > len(order) / 2  # not all at the beginning


def test_peers_are_marked_and_missing_ones_listed(monkeypatch):
    def other(images, batch, device):
        x = images.float() / 255
        return list(x.split(batch)), lambda part: (reference_transform(part) * 0.9).numpy()

    def missing(images, batch, device):
        raise ImportError

    peers = {
        "other": (other, ("cpu",), False, "float32"),
        "missing": (missing, ("cpu",), False, ""),
    }
    monkeypatch.setattr(bench, "PEERS", peers)
    result, rows = run("--peers")
    assert result["not_installed"] == ["missing (cpu)"]
    assert rows["tensor", "other"]["max_abs_error"] > 0.01  # wrong, but timed
    assert rows["tensor", "other"]["median_s"] > 0


def test_uses_the_newest_checkpoint_of_each_model():
    for name, model in (("fc", bench.FullyConnected()), ("cnn", bench.ConvNet("fixed"))):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        flags = {"flip": "fixed"} if name == "cnn" else {}
        torch.save({"model": model.state_dict(), "args": flags}, folder / "best.pt")
    _, rows = run()
    assert rows["tensor", "fc"]["note"] == "weights of runs/fc/best.pt"
    assert rows["report", "cnn"]["note"] == "weights of runs/cnn/best.pt, flip fixed"
    run("--fc", "runs/cnn/best.pt", code=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runs", "0"], "--runs"),
        (["--images", "none"], "--images"),
        (["--fc", "nowhere.pt"], "nowhere.pt"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_invalid_flags_exit_2_with_one_line(capsys, flags, words):
    assert words in refused(capsys, bench, *FEW, *flags, "--out", "out")
