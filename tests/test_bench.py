"""bench.py as a user runs it, on few images and without torch.compile, which takes seconds."""

import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import bench
from common import bench_figures, cases, data, photos, report, tables, timing
from common.models import ConvNet, FullyConnected
from common.peers import Peer
from common.timing import BATCHED, SEQUENTIAL, Case, Timing
from common.transforms import reference_transform
from tests.manual import compare_bench
from tests.runs import ROOT, refused, run_script

NATIVE = cases.native_bfloat16  # what `quick` replaces
FEW = ["--data", "synthetic", "--images", 20, "--batch-size", 10, "--device", "cpu"]
NAMES = {
    *("torchvision sequential", "torchvision batched", "matmul", "matmul compiled", "gemm"),
    *(
        "fused",
        "fused uint8",
        "copy",
        "copy uint8",
        "fc",
        "fc bf16",
        "linear",
        "separable",
        "separable compiled",
        "cnn",
        "cnn bf16",
    ),
}
DOCUMENTED = {
    *("name", "device", "protocol", "dtype", "batch", "images", "runs", "mean_s", "median_s"),
    *("iqr_s", "min_s", "images_per_s", "speedup", "share_of_copy", "max_abs_error"),
    *("accuracy_0.95", "note"),
}


class Narrow(ConvNet):
    """The CNN 4 channels wide in the place of 64, where emulated bfloat16 takes 26 ms an image."""

    def __init__(self, flip="learned"):
        super().__init__(flip)
        for i, channels in {0: (3, 4), 2: (4, 4), 5: (4, 4), 8: (4, 1)}.items():
            self.layers[i] = nn.Conv2d(*channels, 4, padding=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A short benchmark in a folder without checkpoints."""
    real = photos.photographs
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(cases, "SWEEP", [1, 2, 16])
    monkeypatch.setattr(cases, "native_bfloat16", lambda: True)  # its rows are timed anywhere
    monkeypatch.setitem(bench.NETS, "cnn", Narrow)
    monkeypatch.setattr(cases, "PASS_S", 1e9)
    monkeypatch.setattr(timing, "PASSES", 1)
    for module, name in ((cases, "SWEEP_BUDGET_S"), (photos, "WARM")):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(photos, "photographs", lambda count: real(2))
    for chart in ("bars", "growth", "chains"):
        monkeypatch.setattr(bench_figures, chart, lambda path, *args: path.touch())
    for name in ("collect", "freeze"):  # pytest has many objects
        monkeypatch.setattr(gc, name, lambda: None)
    monkeypatch.chdir(tmp_path)


def run(*flags, runs=3):
    """Returns the JSON, and its rows by protocol and name, of batches of 10 in protocol tensor."""
    run_script(bench, *FEW, "--runs", runs, *flags, "--out", "out")
    (path,) = Path("out").glob("bench-*.json")
    result = json.loads(path.read_text())
    rows = [r for r in result["rows"] if r["protocol"] == "report" or r["batch"] in (1, 10)]
    return result, {(row["protocol"], row["name"]): row for row in rows}


def test_run_writes_documented_files(capsys):
    result, rows = run()
    assert sorted(path.suffix for path in Path("out").iterdir()) == [".json", ".md", *[".png"] * 3]
    assert {name for protocol, name in rows if protocol == "tensor"} == NAMES
    assert {name for protocol, name in rows if protocol == "report"} >= {SEQUENTIAL, "fc", "cnn"}
    for row in result["rows"]:
        assert row.keys() >= DOCUMENTED
        assert row["runs"] == 3
        assert row["min_s"] <= row["median_s"]
        assert row["images_per_s"] == pytest.approx(20 / row["median_s"])
        assert row["batch"] <= row["images"]
    assert rows["tensor", "fused"]["max_abs_error"] < 1e-6
    assert rows["tensor", "fused"]["note"] == "into out="
    assert rows["tensor", "fc"]["note"] == "untrained"
    assert rows["tensor", "copy"]["bytes_moved"] == 20 * 2 * 4 * 3 * 32 * 32
    assert rows["tensor", "fused uint8"]["bytes_moved"] == 20 * (3 * 32 * 32 + 4 * 28 * 28)
    assert {row["batch"] for row in result["growth"]} == {1, 2, 16}
    assert result["standard"] is False
    assert result["environment"]["instruction_sets"] is not None
    out = capsys.readouterr().out
    assert "SHORTER THAN STANDARD" in out
    assert all(len(line) < 230 for line in out.splitlines())


def test_default_out_is_not_tracked(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--images", "1"])
    assert bench.flags().out == Path("runs/bench")


def test_speedups_name_one_opponent_for_each_column():
    _, rows = run()
    for protocol in ("report", "tensor"):
        assert rows[protocol, SEQUENTIAL]["speedup_sequential"] == 1
        for name in ("fused", "fc"):
            row, base = rows[protocol, name], rows[protocol, SEQUENTIAL]
            ratio = base["us_per_image"] / row["us_per_image"]
            assert row["speedup_sequential"] == pytest.approx(ratio)
    assert rows["report", BATCHED]["speedup"] == 1
    ratio = rows["report", BATCHED]["us_per_image"] / rows["report", "fc"]["us_per_image"]
    assert rows["report", "fc"]["speedup"] == pytest.approx(ratio)


def test_one_run_has_no_spread(capsys):
    result, _ = run(runs=1)
    assert all(row["iqr_s"] is None and row["noisy"] is None for row in result["rows"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fused ")]
    assert lines
    assert not any("nan" in line for line in lines)


# --- the report's protocol -----------------------------------------------------------------------


def report_case(name, images, step=reference_transform, kind="net"):
    x = data.to_float(images)
    table = [cases.Method(SEQUENTIAL, x, step), cases.Method(name, x, step, kind)]
    found = list(cases.report_cases(images, torch.device("cpu"), table))
    assert [case.name for case in found] == [SEQUENTIAL, name]  # the chain before the net
    return found


def test_report_protocol_builds_its_chain_and_loader_within_the_clock(monkeypatch):
    built = []
    for module, name in ((v2, "Compose"), (cases, "DataLoader")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, **more: (built.append(1), real(*args, **more))[1]
        )
    chain, net = report_case("fc", data.synthetic(5, 0))
    assert not built
    for case in (chain, net):
        built.clear()
        assert torch.equal(
            torch.cat([result.view(-1, 1, 28, 28) for result in case.run()]),
            reference_transform(data.to_float(data.synthetic(5, 0))),
        )
        assert len(built) == 1


def test_report_protocol_draws_no_random_numbers():
    # RandomHorizontalFlip(p=1) does, for each image; the DataLoader takes one seed
    chain, _ = report_case("fc", data.synthetic(5, 0))
    before = torch.get_rng_state()
    list(chain.run())
    assert torch.equal(torch.get_rng_state(), before)


def test_report_protocol_runs_nets_under_no_grad_behind_a_collection(monkeypatch):
    events = []

    def step(batch):
        events.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), len(batch)))
        return batch

    monkeypatch.setattr(gc, "collect", lambda: events.append("collect"))
    _, net = report_case("fc", data.synthetic(150, 0), step)
    timing.seconds(Timing(net))
    assert events == ["collect", (False, False, 100), (False, False, 50)]


# --- what is not timed, and why ------------------------------------------------------------------


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


def fake_clock(monkeypatch):
    """Advances by 1 ms per reading, so that load on the machine does not matter. Returns a function
    that advances it."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: wait(0.001)))
    return wait


def test_slowdown_changes_only_its_own_row(monkeypatch):
    wait = fake_clock(monkeypatch)
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

    for module in (bench, cases):
        monkeypatch.setattr(module, "fused_transform", unflipped)
    _, rows = run()
    for protocol in ("report", "tensor"):
        row = rows[protocol, "fused"]
        assert (row["median_s"], row["runs"]) == (None, 0)
        assert row["max_abs_error"] > 0.1
        assert row["note"].startswith("wrong")
    assert rows["tensor", "matmul"]["median_s"] > 0
    out = capsys.readouterr().out
    assert any(line.startswith("fused ") and "no time" in line for line in out.splitlines())


@pytest.mark.parametrize("native", [False, True])
def test_the_processor_decides_whether_bfloat16_is_timed(monkeypatch, native):
    wait = fake_clock(monkeypatch)
    monkeypatch.setattr(cases, "native_bfloat16", lambda: native)
    slower(monkeypatch, "cnn bf16", lambda result: (wait(0.208), result)[1])
    _, rows = run()
    for protocol in ("report", "tensor"):
        for name in ("cnn", "fc"):
            assert rows[protocol, name]["median_s"] > 0
            row = rows[protocol, f"{name} bf16"]
            if native:  # however slow
                assert row["median_s"] > 0
            else:  # however fast
                assert row["median_s"] is None
                time = {"cnn": "26 ms for one image", "fc": "0.1"}[name]  # 8 in 209 ms, in 1 ms
                assert row["note"].startswith(f"emulated: {time}")


@pytest.mark.parametrize(
    ("sets", "native"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False}, False),
        ({"avx512_f": True, "avx512_vnni": True, "amx_tile": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
    ],
)
def test_units_for_bfloat16_are_known_by_the_instruction_sets(sets, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: sets)
    assert NATIVE() == native


def test_units_for_bfloat16_agree_with_the_name_of_the_machine():
    sets = report.hardware()["instruction_sets"]
    if "avx2" not in sets:
        pytest.skip("no x86 processor that names its instruction sets")
    assert NATIVE() == bool({"avx512-bf16", "amx"} & set(sets))


def test_failing_method_is_tried_once_and_costs_only_its_own_rows(monkeypatch):
    calls = []

    def fail(result):
        calls.append(1)
        raise RuntimeError("no compiler")

    slower(monkeypatch, "matmul compiled", fail)
    result, rows = run()
    failed = [row for row in result["rows"] if row["name"] == "matmul compiled"]
    assert len(failed) == 2  # batches of 10 and of 20
    assert {row["note"] for row in failed} == {"failed: RuntimeError: no compiler"}
    assert {row["median_s"] for row in failed} == {None}
    assert rows["tensor", "matmul"]["median_s"] > 0
    assert len(calls) == 1


def test_row_is_bounded_before_it_starts(monkeypatch):
    called = []
    x = torch.zeros(1000, 3, 32, 32)

    def step(batch):
        called.append(len(batch))
        return batch

    method = cases.Method("cnn", x, step, "net", cost=0.1)  # 100 s for all images
    monkeypatch.setattr(cases, "PASS_S", 2)
    args = SimpleNamespace(batch_size=10, images=1000, dry_run=False)
    sizes = {case.batch: case.images for case in cases.tensor_cases(method, args)}
    assert sizes == {10: 20, 1000: 1000}  # fewer images, but whole batches
    table = [cases.Method(SEQUENTIAL, x, step), method]
    uint8 = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    _, net = cases.report_cases(uint8, torch.device("cpu"), table)
    assert net.skip == "skipped: one pass would take 100 s"
    assert timing.check(net, None).failed
    assert not called


def test_slow_row_runs_fewer_interleaved_passes(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pair(name, seconds, protocol="tensor"):
        def step(item):
            order.append(name)
            now[0] += seconds

        return Timing(Case(name, "cpu", protocol, "", 1, 1, lambda: map(step, [0]), "part"))

    slow, fast, report = pair("slow", 0.02), pair("fast", 0.002), pair("long", 0.04, "report")
    timing.measure([slow, fast, report], 12, 0.13)
    assert len(slow.times) == slow.passes == 6
    assert len(fast.times) == 12
    assert len(report.times) == 9  # its passes take all images: three times the budget
    turns = [i for i, name in enumerate(order) if name == "slow"]
    assert turns[-1] > len(order) / 2  # not all at the beginning


def test_compiling_does_not_count_as_a_slow_pass(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(item):
        now[0] += 0.1 if calls else 20
        calls.append(item)

    case = Case("compiled", "cpu", "tensor", "", 1, 3, lambda: map(step, range(3)), "net")
    monkeypatch.setattr(timing, "as_tensor", lambda result: torch.zeros(case.shape))
    assert timing.check(case, lambda case, result: ({}, "")).once == pytest.approx(0.3)


def test_run_is_the_mean_of_passes_that_lie_a_turn_apart(monkeypatch):
    order = []

    def seconds(each):
        order.append(each.case.name)
        return float(len(order))

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "PASSES", 3)
    devices = {"a": "cpu", "b": "cpu", "gpu": "cuda"}
    made = [Case(name, device, "tensor", "", 1, 1, None) for name, device in devices.items()]
    a, b, gpu = timings = [Timing(case, once=1) for case in made]
    timing.measure(timings, 2, 1e9)
    assert order == [*"ab", "gpu", *"ababab", "gpu", *"abab"]
    assert (a.times, b.times, gpu.times) == ([11 / 3, 32 / 3], [14 / 3, 35 / 3], [3, 10])


# --- crossovers, chains, peers, nets -------------------------------------------------------------


def test_crossover_is_the_batch_from_which_on_the_net_is_faster():
    def rows(name, times):
        return [
            {"name": name, "device": "cpu", "batch": batch, "median_s": seconds}
            for batch, seconds in times.items()
        ]

    sweep = rows(SEQUENTIAL, {1: 3.0})  # one image after the other: 3, 6, 12
    sweep += rows(BATCHED, {1: 3.0, 2: 3.0, 4: 3.0}) + rows("fused", {1: 1.0, 2: 1.0, 4: 1.0})
    sweep += rows("fc", {1: 5.0, 2: 2.5, 4: 2.9})
    sweep += rows("cnn", {1: 2.0, 2: 9.0, 4: 9.0})  # faster at 1 only, by a hair and not for good
    found = {
        (entry["net"], entry["against"]): entry for entry in tables.crossovers(sweep, ["fc", "cnn"])
    }
    batches = {key: entry["from_batch"] for key, entry in found.items()}
    assert batches == {
        ("fc", SEQUENTIAL): 2,
        ("fc", BATCHED): 2,
        ("fc", "fused"): None,
        ("cnn", SEQUENTIAL): 4,
        ("cnn", BATCHED): None,
        ("cnn", "fused"): None,
    }
    assert found["fc", BATCHED]["times_as_fast"] == pytest.approx({1: 0.6, 2: 1.2, 4: 3 / 2.9})
    assert tables.crossover_cells(found["cnn", BATCHED])[3] == "never up to 4"


def test_chains_compare_with_torchvision_before_they_are_timed(monkeypatch):
    real = photos.fuse

    def halved(chain):
        fused = real(chain)
        return lambda images: fused(images) / 2

    result, _ = run()
    forms = {(row["protocol"], row["name"], row["batch"]) for row in result["chains"]}
    for kind in ("uint8 channels_last", "uint8 planar", "float"):
        assert {(name, f"fuse {kind}", n) for name in photos.CHAINS for n in (1, 2)} <= forms
        assert ("train", f"torchvision {kind}", 2) not in forms  # it would share one crop
    assert {("eval", "torchvision PIL", 1), ("train", "fuse PIL", 1)} <= forms
    assert all(row["median_s"] for row in result["chains"])
    compared = [row for row in result["chains"] if row["name"] != "copy"]
    assert all(row["max_levels"] <= 1.01 for row in compared)
    monkeypatch.setattr(photos, "fuse", halved)
    result, _ = run()
    for row in result["chains"]:
        assert (row["median_s"] is None) == row["name"].startswith("fuse")


def test_peers_are_marked_and_missing_ones_listed(monkeypatch):
    def other(images, batch, device):
        x = images.float() / 255
        return list(x.split(batch)), lambda part: (reference_transform(part) * 0.9).numpy()

    def photo(images, draws, device):
        """A wrong peer."""
        return list(images), lambda image: torch.zeros(3, 224, 224)

    def missing(images, batch, device):
        raise ImportError

    peers = {"other": Peer(other, "torch", single=False), "missing": Peer(missing, "")}
    monkeypatch.setattr(cases, "PEERS", peers)
    monkeypatch.setattr(photos, "PHOTO_PEERS", {"photo": Peer(photo, "torch")})
    result, rows = run("--peers")
    assert result["not_installed"] == ["missing (cpu)"]
    row = rows["tensor", "other"]
    assert row["max_abs_error"] > 0.01  # wrong, but timed
    assert row["median_s"] > 0
    assert row["peer"]
    assert 1 < row["mean_levels"] < row["max_levels"] < 26
    assert row["note"].startswith("torch 2")
    found = [row for row in result["chains"] if row["name"] == "photo"]
    assert [row["protocol"] for row in found] == ["eval", "train"]
    assert all(row["median_s"] > 0 and row["max_levels"] > 50 for row in found)


def test_slow_peer_takes_fewer_images(monkeypatch):
    def make(images, batch, device):
        return list(images.split(batch)), lambda item: item

    def failing(images, batch, device):
        return list(images), lambda item: 1 / 0

    peers = {"slow": Peer(make, "torch", single=False), "failing": Peer(failing, "torch")}
    monkeypatch.setattr(cases, "PEERS", peers)
    monkeypatch.setattr(cases, "PASS_S", 2)
    now = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    images = torch.zeros(35, 3, 32, 32, dtype=torch.uint8)  # a second a call
    found, _ = cases.peer_cases(images, [torch.device("cpu")], 10)
    assert [(case.name, case.batch, case.images) for case in found] == [
        ("slow", 10, 20),
        ("slow", 35, 35),
        ("failing", 1, 35),
    ]
    assert [len(list(case.run())) for case in found[:2]] == [2, 1]
    assert timing.check(found[2], None).note == "failed: ZeroDivisionError: division by zero"


def test_uses_the_newest_checkpoint_of_each_model():
    for name, model in (("fc", FullyConnected()), ("cnn", ConvNet("fixed"))):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        flags = {"flip": "fixed"} if name == "cnn" else {}
        torch.save({"model": model.state_dict(), "args": flags}, folder / "best.pt")
    net, note = bench.trained(ConvNet, None)
    assert (net.flip, net.training) == ("fixed", False)
    assert note == "weights of runs/cnn/best.pt, flip fixed"
    assert bench.trained(FullyConnected, None)[1] == "weights of runs/fc/best.pt"
    assert bench.trained(bench.Separable, None)[1] == "untrained"
    with pytest.raises(bench.UserError):
        bench.trained(FullyConnected, "runs/cnn/best.pt")
    toy, few = Path("runs/reproduce-quick/best.pt"), FullyConnected()
    toy.parent.mkdir()
    torch.save({"model": few.state_dict(), "args": {"dry_run": True}}, toy)  # the newest
    assert bench.trained(FullyConnected, None)[1] == "weights of runs/fc/best.pt"
    assert bench.trained(FullyConnected, str(toy))[1] == f"weights of {toy}"
    Path("runs/fc/best.pt").unlink()
    net, note = bench.trained(FullyConnected, None)
    assert note == "untrained"
    assert not torch.equal(net.layers[1].weight, few.layers[1].weight)


# --- what is left --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "gpu", "name"),
    [
        (["avx2"], False, "amd-epyc-avx2"),
        (["avx2", "avx512", "avx512-bf16"], False, "amd-epyc-avx512-bf16"),
        (["avx2", "avx512", "avx512-bf16", "amx"], False, "amd-epyc-amx"),
        ([], False, "amd-epyc"),
        (["avx2"], True, "nvidia-h100-80gb"),
    ],
)
def test_results_are_named_by_machine(sets, gpu, name):
    environment = {"processor": "AMD EPYC", "instruction_sets": sets, "gpu": "NVIDIA H100 80GB"}
    assert report.machine_name(environment, gpu) == name


@pytest.mark.parametrize("model", ["Processor", "CPU @ 2.20GHz"])
def test_trade_marks_are_no_part_of_a_machines_name(model):
    environment = {"processor": f"Intel(R) Xeon(R) {model}", "instruction_sets": ["avx512"]}
    assert report.machine_name(environment | {"gpu": None}, False) == "intel-xeon-avx512"


def test_compare_lists_rows_beyond_their_spread(tmp_path, monkeypatch, capsys):
    def row(name, seconds, iqr=0.01):
        keys = {"device": "cpu", "protocol": "tensor", "dtype": "float32", "batch": 100}
        times = {"median_s": 1.0, "mean_s": seconds, "iqr_s": iqr}
        return keys | times | {"name": name, "images": 1, "synchronised": True}

    first = [row("copy", 1.0), row("fused", 2.0), row("fc", 8.0, 0.3), row("matmul", 3.0)]
    first.append(row("cnn", 90.0))
    # half as fast a machine, though not in its copies
    second = [row("copy", 1.8), row("fused", 4.8), row("fc", 17.0, 0.3), row("matmul", 6.0)]
    for name, rows in (("a.json", first), ("b.json", second)):
        Path(name).write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("sys.argv", ["compare_bench", "a.json", "b.json"])
    with pytest.raises(SystemExit) as stopped:
        compare_bench.main()
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "fused" in lines[0]
    assert "+20.0%" in lines[0]
    assert lines[0].endswith("slower")
    assert "copy" in lines[1]
    assert "-10.0%" in lines[1]
    assert lines[2].startswith("only in a.json: cpu tensor cnn")
    assert lines[3] == "4 rows, 1 beyond 15 %, the largest change 20.0%"


def test_charts(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real chart functions
    shown = []
    monkeypatch.setattr(bench_figures, "save", lambda figure, path: shown.append(figure))
    row = {"name": "fused", "device": "cpu", "protocol": "report", "batch": 10, "us_per_image": 1.0}
    row |= {"median_s": 1.0, "mean_s": 2.0, "peer": False, "synchronised": True, "note": ""}
    failed = row | {"name": "cnn", "median_s": None, "us_per_image": None}
    quick = row | {"protocol": "tensor", "us_per_image": 0.1, "peer": True, "name": "opencv"}
    reported = {("cpu", "fc"): 0.13, ("cuda", "fc"): 9.0}
    bench_figures.bars(tmp_path, [row, failed, quick], reported, "title")
    labels = [text.get_text() for text in shown[0].axes[0].get_yticklabels()]
    assert labels == ["fc, by the report", "fused, batches of 10"]
    assert shown[0].axes[0].patches[1].get_width() == 2  # the report's figure is the mean
    assert all(axis.get_xscale() == "log" for axis in shown[0].axes)
    assert all(axis.get_xlim()[0] < 0.1 for axis in shown[0].axes)  # no bar is cut off
    (legend,) = shown[0].legends
    assert "other libraries" in [text.get_text() for text in legend.get_texts()]

    sweep = [row | {"name": "fc", "batch": n, "us_per_image": 8.0 / n} for n in (1, 4)]
    crossing = {"device": "cpu", "net": "fc", "against": BATCHED, "from_batch": 4}
    bench_figures.growth(tmp_path, sweep, [crossing, crossing | {"from_batch": None}], "title")
    line, mark, *_ = shown[1].axes[0].lines
    assert list(line.get_xdata()) == [1, 4]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([4], [2.0])

    photo = row | {"protocol": "eval", "name": "fuse PIL", "batch": 1, "us_per_image": 500.0}
    photo |= {"speedup": 3.0, "mean_levels": 0.5}
    bench_figures.chains(tmp_path, [photo], tables.TITLES, "title")
    assert shown[2].axes[0].texts[0].get_text() == " 0.5  3x, off by 0.5 levels"


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize("given", [None, ""], ids=["unset", "set by the user"])
def test_python_starts_anew_once(given, tmp_path):
    code = """
import os, sys
print("started", flush=True)
from common import glibc
glibc.restart()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""
    (tmp_path / "script.py").write_text(code)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("GLIBC_", "BENCH_"))}
    variables |= {"PYTHONPATH": str(ROOT)} | ({} if given is None else {"GLIBC_TUNABLES": given})
    command = [sys.executable, str(tmp_path / "script.py"), "--runs", "1"]
    done = subprocess.run(
        command, env=variables, check=True, capture_output=True, text=True, timeout=200
    )
    last = f"{'glibc.malloc.tcache_count=0' if given is None else given} --runs 1"
    assert done.stdout.splitlines() == ["started"] * (2 if given is None else 1) + [last]
