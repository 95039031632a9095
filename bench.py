"""Times the transform chain, the fused operator and the trained nets against each other, on the
CPU and on the GPU where there is one, and says of each how right it is.

    python bench.py --runs 30                  nets: the newest under runs/, else untrained
    python bench.py --runs 30 --peers          other libraries too (requirements-peers.txt)
    python bench.py --fc runs/fc/best.pt --cnn runs/cnn/best.pt --device cpu

Protocol `report` is the report's: the chain image by image on the CPU, the nets through a
DataLoader with batches of 100, copies to the device included. Protocol `tensor` takes batches of
a tensor that lies on the device, of --batch-size and of each method's own best size.

Every row's result is compared with torchvision's before it is timed; one that ought to be equal
and is not gets no time. The rows then run in turns, so that a disturbance meets all of them, each
pass over all images behind one untimed batch. A row that takes long makes fewer passes, spread
over the whole run; the table says how many. On a GPU, `tensor` rows are device time between two
events behind a flushed L2 cache, with the host's time a call beside it.

Rows in bfloat16 are not timed where the processor emulates it. Leaves bench-DEVICE.json, the table
in Markdown and two charts in --out. About eight minutes on two CPU cores.
"""

import argparse
import copy
import ctypes
import json
import os
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm import tqdm

from common import UserError, checkpoints, cli, data, distributed, figures, metrics, report
from common.models import ConvNet, FullyConnected
from common.peers import PEERS
from common.transforms import fused_transform, matmul_transform, reference_transform

BASE = "torchvision sequential"
TOLERANCE = 1e-5  # of a row that computes the chain itself, in float32
BUDGET_S = 20  # for one row; beyond it a row makes fewer passes,
EMULATED = 3  # times slower than float32: the processor has no bfloat16 units
LEAST_RUNS = 3  # but never fewer than these
GROWTH = (1, 10, 100, 1000, 10_000)
GROWTH_BUDGET_S = 0.5

# Section 1.4.1 and 2.2.1 of the report: seconds for 10,000 images on its machine.
REPORT = {
    ("cuda", "fc"): 0.139562,
    ("cpu", "fc"): 0.13146,
    ("cpu", BASE): 0.754336,
    ("cuda", "cnn"): 0.587102,
    ("cpu", "cnn"): 2.900498,
}


@dataclass
class Method:
    """A way to treat a batch. kind: "chain" must equal the reference, "net" and "peer" are marked
    with their error, "part" is only a part of the work. largest: the largest batch to try."""

    name: str
    source: Tensor
    step: Callable[[Any], Any]
    kind: str = "chain"
    note: str = ""
    largest: int = 10_000
    dtype: str = "float32"


@dataclass
class Row:
    """One line of the table: a pass is `step` for each of `items`, `images` of them in all."""

    name: str
    device: str
    protocol: str
    dtype: str
    batch: int
    images: int
    items: Iterable
    step: Callable[[Any], Any]
    kind: str
    note: str = ""
    moved: int = 0  # bytes that a pass must read and write
    error: float | None = None
    accuracy: float | None = None
    failed: bool = False
    runs: int = 0
    once: float | None = None  # roughly the seconds of a pass
    calls: int = 1  # passes that are timed together, where one is shorter than the clock is good
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def main() -> None:
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = cli.number(int, 1)
    p.add_argument("--runs", type=count, default=30, help="passes of each row (%(default)s)")
    p.add_argument("--images", type=count, default=10_000, help="%(default)s")
    p.add_argument("--batch-size", type=count, default=100, help="%(default)s")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--data", choices=["auto", "cifar10", "synthetic"], default="auto")
    cli.data_dir(p)
    p.add_argument(
        "--fc", type=cli.path, help="checkpoint of train_fc.py (default: the newest under runs/)"
    )
    p.add_argument(
        "--cnn", type=cli.path, help="checkpoint of train_cnn.py (default: the newest under runs/)"
    )
    p.add_argument("--peers", action="store_true", help="time other libraries too")
    p.add_argument("--out", type=cli.path, help="the results' folder (default: runs/bench)")
    p.add_argument("--dry-run", action="store_true", help="few images and runs, in seconds")
    args = p.parse_args()
    if args.dry_run:
        args.runs, args.images = min(args.runs, 2), min(args.images, 200)
    args.out = Path(args.out or ("runs/bench-dry-run" if args.dry_run else "runs/bench"))
    args.batch_size = min(args.batch_size, args.images)
    checkpoints.lock(args.out)
    devices = [torch.device(name) for name in distributed.devices(args.device)]
    keep_memory()

    # the images, and what the chain makes of them
    name = data.choose(args.data, args.data_dir)
    images = data.images(name, args.data_dir, False, args.images, seed=0)
    reference = torch.cat([reference_transform(part) for part in images.split(1000)])
    nets = {
        "fc": trained(args.fc, lambda flags: FullyConnected()),
        "cnn": trained(args.cnn, lambda flags: ConvNet(flags.get("flip", "learned"))),
    }
    environment = report.environment() | {"memory_gb": memory_gb(), "driver": driver()}
    print(" ".join(f"{key}:{value}" for key, value in environment.items()))

    # the rows, and time against batch size
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", module="torch._dynamo")
    rows, growth, absent = report_rows(images, devices, nets), [], []
    factor = cli.bfloat16_factor()
    for row in rows:
        mark_emulated(row, factor)
    for device in devices:
        for method in methods(images, device, nets):
            sizes = [n for n in GROWTH if n <= min(args.images, method.largest)]
            sizes = sizes[-1:] if args.dry_run else sizes
            row = batch_row(method, device, args.batch_size, method.source)
            if mark_emulated(row, factor):
                rows.append(row)
                continue
            own = [batch_row(method, device, n, method.source[:n]) for n in sizes]
            if method.name != BASE:
                growth += grow(own)
            batch = 1 if method.name == BASE else args.batch_size
            tried = [batch_row(method, device, n, method.source) for n in {batch, *sizes[1:]}]
            best = best_batch(tried, batch)
            rows += [batch_row(method, device, n, method.source) for n in sorted({batch, best})]
    if args.peers:
        for device in devices:
            found, missing = peer_rows(images, device, args.batch_size)
            rows, absent = rows + found, absent + missing

    for row in tqdm([row for row in rows if not row.failed], "checking", leave=False, disable=None):
        check(row, reference)
    measure([row for row in rows if not row.failed], args.runs, BUDGET_S)

    # the report
    results = [summary(row) for row in rows]
    compare(results)
    results.sort(key=lambda r: (r["device"], r["protocol"], r["us_per_image"] or float("inf")))
    gpu = environment["gpu"] if devices[-1].type == "cuda" else None
    machine = gpu or environment["processor"] + " AMX" * environment["amx"]
    slug = re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")
    write_results(args.out / f"bench-{slug}", args, environment, name, results, growth, absent)


def trained(path: str | None, make: Callable[[dict], nn.Module]) -> tuple[nn.Module, str]:
    """The net in the checkpoint at `path`, or in the newest that fits under runs/, or untrained;
    and a note which it is. make: the checkpoint's flags -> an empty net."""
    if path:
        paths = [Path(path)]
    else:
        paths = [each for each in Path("runs").rglob("best.pt") if "dry-run" not in str(each)]
        paths.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    for each in paths:
        try:
            model = make({})
            model = make(checkpoints.load_checkpoint(each, model).get("args", {}))
            checkpoints.load_checkpoint(each, model)
            flip = f", flip {model.flip}" if isinstance(model, ConvNet) else ""
            return model.eval(), f"weights of {each}{flip}"
        except UserError:
            if path:
                raise
    return make({}).eval(), "untrained"


# --- what is timed -----------------------------------------------------------------------------


def report_rows(images: Tensor, devices: list[torch.device], nets: dict) -> list[Row]:
    """The report's protocol, with the chain and the operator in the loader's batches beside it."""
    x = data.to_float(images)
    chain = v2.Compose(
        [
            v2.Resize((28, 28), antialias=True),
            v2.Grayscale(),
            v2.RandomHorizontalFlip(p=1),
            v2.RandomVerticalFlip(p=1),
        ]
    )
    n = len(x)
    rows = [Row(BASE, "cpu", "report", "float32", 1, n, x.unbind(), chain, "chain")]
    loader = DataLoader(TensorDataset(x), batch_size=100)

    def add(name: str, step: Callable, kind: str, device: torch.device, note: str = "") -> None:
        dtype = "bfloat16" if "bf16" in name else "float32"
        whole = lambda batch: step(batch[0].to(device))  # noqa: E731
        rows.append(Row(name, device.type, "report", dtype, 100, n, loader, whole, kind, note))

    for device in devices:
        add("copy", lambda batch: batch, "part", device, "the loader and the copy alone")
        add("torchvision batched", reference_transform, "chain", device)
        add("fused", fused_transform, "chain", device)
        for name, (net, note) in nets.items():
            net, half = on(device, net)
            add(name, net, "net", device, note)
            add(f"{name} bf16", half, "net", device, note)
    return rows


def on(device: torch.device, net: nn.Module) -> tuple[nn.Module, Callable]:
    """A copy of the net on a device, and one in bfloat16 that takes float32 images."""
    net = copy.deepcopy(net).to(device)
    half = copy.deepcopy(net).bfloat16()
    return net, lambda batch: half(batch.bfloat16())


def methods(images: Tensor, device: torch.device, nets: dict) -> list[Method]:
    """Everything that `tensor` compares, from images on the device."""
    uint8 = images.to(device)
    x = data.to_float(uint8)
    copied, out = torch.empty_like(x), x.new_empty(len(x), 1, 28, 28)
    matrix = reference_transform(torch.eye(3072).view(-1, 3, 32, 32)).flatten(1).to(device)
    (fc, fc_note), (cnn, cnn_note) = nets["fc"], nets["cnn"]
    (fc, fc16), (cnn, cnn16) = on(device, fc), on(device, cnn)
    first, second = fc.layers[1], fc.layers[2]

    def products(batch: Tensor) -> Tensor:
        hidden = torch.addmm(first.bias, batch.flatten(1), first.weight.T)
        return torch.addmm(second.bias, hidden, second.weight.T)

    def fused(batch: Tensor) -> Tensor:
        return fused_transform(batch, out=out[: len(batch)])

    compiled = torch.compile(matmul_transform, dynamic=False)
    most = 1000  # the CNN's maps of 10,000 images take 10 GB
    half = "bfloat16"
    return [
        Method("copy", x, lambda batch: copied[: len(batch)].copy_(batch), "part"),
        Method("fused", x, fused, note="into out="),
        Method("fused uint8", uint8, fused, note="into out=", dtype="uint8"),
        Method("matmul compiled", x, compiled, note="torch.compile, one graph a shape"),
        Method("matmul", x, matmul_transform),
        Method("gemm", x, lambda b: (b.flatten(1) @ matrix).view(-1, 1, 28, 28), note="3072 x 784"),
        Method("torchvision batched", x, reference_transform),
        Method(BASE, x, lambda batch: reference_transform(batch[0]), largest=1),
        Method("fc products", x, products, "part", "the net's two addmm alone"),
        Method("fc", x, fc, "net", fc_note),
        Method("fc bf16", x, fc16, "net", fc_note, dtype=half),
        Method("cnn", x, cnn, "net", cnn_note, most),
        Method("cnn bf16", x, cnn16, "net", cnn_note, most, half),
    ]


def batch_row(method: Method, device: torch.device, batch: int, source: Tensor) -> Row:
    """A row of protocol `tensor`: `source`, the method's images or some of them, in batches."""
    moved = source.nbytes + (source.nbytes if method.name == "copy" else len(source) * 784 * 4)
    return Row(
        method.name, device.type, "tensor", method.dtype, batch, len(source),
        source.split(batch), method.step, method.kind, method.note, moved,
    )  # fmt: skip


def peer_rows(images: Tensor, device: torch.device, batch: int) -> tuple[list[Row], list[str]]:
    """The rows of the peers that are installed, and the names of those that are not."""
    rows, absent = [], []
    for name, (peer, devices, single, dtype) in PEERS.items():
        if device.type not in devices:
            continue
        for size in {1} if single else sorted({batch, min(1000, len(images))}):
            try:
                items, step = peer(images, size, device)
            except ImportError:
                absent.append(f"{name} ({device.type})")
                break
            except Exception as error:  # what a foreign library raises is its own affair
                absent.append(f"{name} ({device.type}): {type(error).__name__}: {error}")
                break
            n = len(images)
            rows.append(Row(name, device.type, "tensor", dtype, size, n, items, step, "peer"))
    return rows, absent


# --- how it is timed ---------------------------------------------------------------------------


def mark_emulated(row: Row, factor: float) -> bool:
    """Whether the processor, on which bfloat16 is `factor` times slower than float32, emulates the
    row's dtype: then the row is not timed, as it would take minutes and tell nothing."""
    if row.dtype == "bfloat16" and row.device == "cpu" and factor > EMULATED:
        row.failed, row.note = True, f"not timed: bfloat16 is emulated, {factor:.0f} times slower"
        return True
    return False


def check(row: Row, reference: Tensor) -> None:
    """Runs a row once and compares; a row that fails, or is wrong and must not be, is marked."""
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            parts = [as_tensor(row.step(item)) for item in row.items]
    except Exception as error:  # one row's failure costs that row
        row.failed, row.note = True, f"failed: {type(error).__name__}: {error}".splitlines()[0]
        return
    row.once = time.perf_counter() - start
    if row.kind == "part":
        return
    result = torch.cat([part.reshape(-1, 1, 28, 28) for part in parts])
    row.error = (result - reference).abs().max().item()
    row.accuracy = metrics.accuracy(result, reference, 0.95)
    if row.kind == "chain" and not row.error <= TOLERANCE:
        row.failed, row.note = True, f"wrong: off by {row.error:.2g}"


def as_tensor(result: Any) -> Tensor:
    """A copy on the CPU in float32 in [0, 1]; `step` may write its next result over this one."""
    if not isinstance(result, Tensor):
        result = torch.tensor(np.asarray(result))
    result = result.cpu().clone()
    return result / 255 if result.dtype == torch.uint8 else result.float()


@torch.inference_mode()
def seconds(row: Row) -> float:
    """One pass, behind one untimed item: whatever ran before has taken the caches."""
    items, step, calls, cuda = row.items, row.step, row.calls, row.device == "cuda"
    step(next(iter(items)))
    if cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # larger than any L2 cache
        torch.cuda.synchronize()
        events[0].record()
    start = time.perf_counter()
    for _ in range(calls):
        for item in items:
            step(item)
    host = time.perf_counter() - start
    if cuda:
        events[1].record()
        torch.cuda.synchronize()
    whole = time.perf_counter() - start
    if cuda and row.protocol == "tensor":
        row.host.append(host / calls / (row.images / row.batch))
        whole = events[0].elapsed_time(events[1]) / 1e3
    return whole / calls


def measure(rows: list[Row], runs: int, budget: float) -> None:
    """Fills `times`: the rows in turns, one pass each a round, slow ones in some rounds only."""
    for row in rows:
        if row.once is None or row.once < 1:  # else `check` has taken long enough to know
            row.once = seconds(row)
        row.runs = max(min(LEAST_RUNS, runs), min(runs, int(budget / row.once)))
        row.calls = max(1, int(1e-3 / row.once))
        row.host.clear()
    for run in tqdm(range(runs), "timing", leave=False, disable=None):
        for row in rows:
            if run * row.runs % runs < row.runs:
                row.times.append(seconds(row))


def grow(rows: list[Row]) -> list[dict]:
    """Times one batch of each size; a size that fails is left out."""
    result, timed = [], []
    for row in rows:
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                row.step(row.items[0])
        except Exception:  # `check` names the reason
            continue
        row.note = f"first call {time.perf_counter() - start:.3g} s"  # with what it compiles
        timed.append(row)
    measure(timed, 9, GROWTH_BUDGET_S)
    for row in timed:
        keys = ("name", "device", "batch", "runs", "median_s", "iqr_s", "us_per_image", "note")
        result.append({key: summary(row)[key] for key in keys})
    return result


def best_batch(rows: list[Row], batch: int) -> int:
    """The batch size of the row whose pass over all images is the fastest, if it gains a tenth,
    else `batch`. One batch alone would not tell: the caches hold a small one from call to call.
    Where a pass takes a second, the batch hardly matters, and `batch` it is."""
    try:
        if max(seconds(row) for row in rows if row.batch == batch) > 1:
            return batch
        measure(rows, 5, GROWTH_BUDGET_S)
    except Exception:  # `check` names the reason
        return batch
    cost = {row.batch: statistics.median(row.times) for row in rows}
    best = min(cost, key=cost.get)
    return best if cost[best] < 0.9 * cost[batch] else batch


def summary(row: Row) -> dict[str, Any]:
    """The row as it stands in the JSON."""
    result = {key: getattr(row, key) for key in ("name", "device", "protocol", "dtype", "batch")}
    result |= {"images": row.images, "runs": len(row.times)}
    keys = ("mean_s", "median_s", "iqr_s", "min_s", "images_per_s", "us_per_image")
    result |= dict.fromkeys((*keys, "host_us_per_call", "noisy", "speedup", "share_of_copy"))
    if row.times:
        low, median, high = np.percentile(row.times, (25, 50, 75)).tolist()
        values = (statistics.mean(row.times), median, high - low, min(row.times))
        result |= dict(
            zip(keys, (*values, row.images / median, 1e6 * median / row.images), strict=True)
        )
        result["noisy"] = high - low > 0.1 * median
        result["host_us_per_call"] = 1e6 * statistics.median(row.host) if row.host else None
    result |= {"max_abs_error": row.error, "accuracy_0.95": row.accuracy, "note": row.note}
    return result | {"bytes_moved": row.moved or None, "peer": row.kind == "peer"}


def compare(results: list[dict]) -> None:
    """Adds each row's speed-up over the chain image by image, on the CPU in the same protocol,
    and its share of the fastest copy's bandwidth on its own device."""
    for row in results:
        same = [r for r in results if r["protocol"] == row["protocol"] and r["median_s"]]
        base = next((r for r in same if r["name"] == BASE and r["device"] == "cpu"), None)
        if row["median_s"] and base:
            row["speedup"] = base["median_s"] / row["median_s"]
        copies = [r for r in same if r["name"] == "copy" and r["device"] == row["device"]]
        if row["median_s"] and row["bytes_moved"] and copies:
            fastest = max(r["bytes_moved"] / r["median_s"] for r in copies)
            row["share_of_copy"] = row["bytes_moved"] / row["median_s"] / fastest


# --- what is left ------------------------------------------------------------------------------

COLUMNS = (
    ("row", 22), ("dtype", 8), ("batch", 5), ("runs", 4), ("median ms", 9), ("IQR", 5),
    ("min ms", 8), ("mean ms", 8), ("us/image", 8), ("speed-up", 8), ("of copy", 7),
    ("error", 7), (">= 0.95", 8),
)  # fmt: skip


def cells(row: dict) -> list[str]:
    """A result as text, column by column."""
    text = [row["name"], row["dtype"], str(row["batch"]), str(row["runs"] or "")]
    if row["median_s"] is None:
        text += ["no time"] + [""] * 6
    else:
        spread = f"{100 * row['iqr_s'] / row['median_s']:.0f}%{'!' if row['noisy'] else ''}"
        share = row["share_of_copy"]
        text += [f"{1e3 * row['median_s']:.4g}", spread]
        text += [f"{1e3 * row[key]:.4g}" for key in ("min_s", "mean_s")]
        text += [f"{row['us_per_image']:.3g}", f"{row['speedup']:.3g}" if row["speedup"] else ""]
        text += ["" if share is None else f"{100 * share:.0f}%"]
    error, accuracy = row["max_abs_error"], row["accuracy_0.95"]
    text += ["" if error is None else f"{error:.1e}"]
    return [*text, "" if accuracy is None else f"{100 * accuracy:.2f}%"]


def tables(results: list[dict]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells) for each device and protocol."""
    groups: dict[tuple, list] = {}
    for row in results:
        groups.setdefault((row["device"], row["protocol"]), []).append(cells(row))
    return [(f"{device}, protocol {protocol}", rows) for (device, protocol), rows in groups.items()]


def write_results(
    stem: Path, args: Any, environment: dict, data_name: str, results: list, growth: list,
    absent: list,
) -> None:  # fmt: skip
    """The table on the terminal and in Markdown, the JSON and the charts."""
    flags = {key: str(value) for key, value in vars(args).items()}
    document = {"environment": environment, "args": flags, "data": data_name}
    document |= {"rows": results, "growth": growth, "not_installed": absent}
    checkpoints.write_text(stem.with_suffix(".json"), json.dumps(document, indent=1) + "\n")

    title = f"{args.images} {data_name} images, torch {environment['torch']}, "
    title += f"{environment['threads']} threads of {environment['processor']}"
    title += " with AMX" if environment["amx"] else ""
    title += f", {environment['gpu']}" if environment["gpu"] else ""
    notes = sorted({f"{r['name']}: {r['note']}" for r in results if r["note"]})
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    notes += ["! marks an IQR of more than a tenth of the median", "of copy: bytes moved a second"]
    names = [name for name, _ in COLUMNS]
    markdown = f"# {title}\n\n`python {environment['command']}`\n"
    print(title)
    for heading, rows in tables(results):
        print(f"\n{heading}")
        for row in [names, *rows]:
            sized = zip(row, (width for _, width in COLUMNS), strict=True)
            print(" ".join(f"{x:>{w}}" if i else f"{x:{w}}" for i, (x, w) in enumerate(sized)))
        lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
        markdown += f"\n## {heading}\n\n" + "".join(f"| {' | '.join(x)} |\n" for x in lines)
    print("\n" + "\n".join(notes))
    markdown += "\n" + "".join(f"- {note}\n" for note in notes)
    checkpoints.write_text(stem.with_suffix(".md"), markdown)
    figures.bench_bars(stem.with_suffix(".png"), results, REPORT, title)
    figures.bench_growth(stem.with_name(stem.name + "-growth.png"), growth, title)
    print(f"results in {stem}.json, .md, .png and -growth.png")


def keep_memory() -> None:
    """Tells glibc to keep what is freed. By itself it decides by what was freed before, and a row
    would take up to four times as long by the rows before it."""
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest it takes


def memory_gb() -> float | None:
    """The machine's memory."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        return None


def driver() -> str | None:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    cli.run(main)
