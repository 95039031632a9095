"""bench.py's methods as cases: which batches of which images each of them is timed on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from common import data, metrics
from common.peers import PEERS, passes
from common.timing import SEQUENTIAL, Case, check, fidelity, measure, probe, reason, summary
from common.transforms import fused_transform

TOLERANCE = 1e-5  # of a row that computes the chain itself, in float32
BF16_SETS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, ARM; named as torch does
PROBED = 8  # images that a method is probed with
# Of protocol `tensor`: a pass that would take longer takes fewer images, since a row of few passes
# has met few of the machine's states.
PASS_S = 0.25
PASS_LIMIT_S = 60  # of protocol `report`; beyond it the row is skipped
SWEEP = [2**k for k in range(13)]  # batch sizes: 1 to 4,096
SWEEP_BATCH_S = 2  # beyond it a batch size is left out
SWEEP_RUNS, SWEEP_BUDGET_S = 9, 0.3


@dataclass
class Method:
    """A way to process a batch of `source`. kind: as in `Case`. bytes_moved: what must be read and
    written for an image. largest: the largest batch. sweep: also timed at the batch sizes of SWEEP.
    compiles: by torch.compile. cost, skip: set by `assess`: seconds per image, and the reason why
    it is not timed."""

    name: str
    source: Tensor
    step: Callable[[Tensor], Tensor]
    kind: str = "chain"
    note: str = ""
    dtype: str = "float32"
    bytes_moved: int = 4 * (3 * 32 * 32 + 28 * 28)
    largest: int = 10_000
    sweep: bool = False
    compiles: bool = False
    cost: float = 0.0
    skip: str = ""


def native_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without them torch emulates it. The
    clock would not do: a small net may take about as long in both."""
    sets = torch.cpu.get_capabilities()
    return any(sets.get(name, False) for name in BF16_SETS)


def assess(method: Method, table: list[Method], args: Any) -> None:
    """Calls a method on a few images and sets its cost, or `skip` where it fails or is emulated:
    then none of its rows is tried."""
    size = args.batch_size if method.compiles else PROBED
    few = method.source[: min(size, method.largest)]
    try:
        first, later = probe(method.step, few)
    except Exception as error:  # a method's failure costs its own rows
        method.skip = reason(error)
        return
    method.cost = later / len(few)
    if method.compiles:
        compiling = f"torch.compile: {first:.2g} s for the first graph, one for each shape"
        method.note = "; ".join(filter(None, [method.note, compiling]))
    on_cpu = method.source.device.type == "cpu"
    if method.dtype == "bfloat16" and on_cpu and not native_bfloat16():
        single = next(m for m in table if f"{m.name} bf16" == method.name)
        method.skip = f"emulated: {1e3 * method.cost:.2g} ms for one image, "
        method.skip += f"{1e3 * single.cost:.2g} ms in float32"


def report_cases(images: Tensor, device: torch.device, table: list[Method]) -> Iterator[Case]:
    """The report's protocol on one device: the chain first, then the nets, with other methods in
    the loader's batches beside them. On a GPU what the report timed stands twice: as its clock
    stopped, which did not wait for the last kernels, and waiting for them."""
    x = data.to_float(images)
    here = x.to(device)

    def one_by_one() -> Iterator[Tensor]:
        chain = v2.Compose([v2.Resize((28, 28), antialias=True), v2.Grayscale(), F.hflip, F.vflip])
        for image in here:
            yield chain(image)

    def through_loader(step: Callable) -> Callable[[], Iterator]:
        def run() -> Iterator[Tensor]:
            for (batch,) in DataLoader(TensorDataset(x), batch_size=100):
                yield step(batch.to(device))

        return run

    mine = [method for method in table if method.source.device.type == device.type]
    mine.sort(key=lambda method: method.name != SEQUENTIAL)
    for method in mine:
        name, note, batch = method.name, method.note, min(100, len(x))
        run = through_loader(method.step)
        if name == SEQUENTIAL:
            run, batch = one_by_one, 1
        elif name == "copy":
            run, note = through_loader(lambda batch: batch), "the loader and the copy alone"
        elif name == "fused":
            run, note = through_loader(fused_transform), ""
        elif name in ("copy uint8", "fused uint8", "matmul", "matmul compiled", "gemm"):
            continue  # the loader hides the difference
        skip, seconds = method.skip, method.cost * len(x)
        if not skip and seconds > PASS_LIMIT_S:
            skip = f"skipped: one pass would take {seconds:.0f} s"
        both = device.type == "cuda" and name in (SEQUENTIAL, "fc", "cnn")
        for waits in [True, False] if both else [True]:
            yield Case(
                name, device.type, "report", method.dtype, batch, len(x), run, method.kind,
                note if waits else f"{note} (the last kernels are not waited for)".strip(),
                skip, synchronised=waits,
            )  # fmt: skip


def tensor_cases(method: Method, args: Any) -> Iterator[Case]:
    """The rows of protocol `tensor`. A slow method takes some of the images only."""
    sizes = {args.batch_size} | (set() if args.dry_run else {1000, args.images})
    for size in sorted({min(size, method.largest, args.images) for size in sizes}):
        count = affordable(method.cost, len(method.source), size)
        yield batches(method, method.source[:count], size)


def affordable(cost: float, images: int, size: int) -> int:
    """How many of the images a pass takes: whole batches for PASS_S, one at least. cost: seconds an
    image."""
    if cost * images <= PASS_S:
        return images
    return min(images, max(1, int(PASS_S / cost) // size) * size)


def batches(method: Method, source: Tensor, size: int) -> Case:
    """A case of protocol `tensor`: `source` in batches of `size`."""
    parts = source.split(size)
    return Case(
        method.name, source.device.type, "tensor", method.dtype, size, len(source),
        lambda: map(method.step, parts), method.kind, method.note, method.skip,
        method.bytes_moved * len(source),
    )  # fmt: skip


def sweep(table: list[Method], args: Any) -> list[dict]:
    """Rows of one batch of each size, as long as one takes no more than SWEEP_BATCH_S."""
    timings = []
    for method in table:
        for size in [1, 16] if args.dry_run else SWEEP:
            if not method.sweep or method.skip or size > args.images:
                continue
            if method.cost * size > SWEEP_BATCH_S or (method.name == SEQUENTIAL and size > 1):
                continue
            count = min(16, args.images) if method.name == SEQUENTIAL else size  # steadier than 1
            case = batches(method, method.source[:count], size)
            timings.append(check(case, lambda case, result: ({}, "")))
    timings = [timing for timing in timings if not timing.failed]
    measure(timings, min(args.runs, SWEEP_RUNS), SWEEP_BUDGET_S)
    rows = [summary(timing) for timing in timings]
    for row in rows:
        row["median_s"] *= row["batch"] / row["images"]  # of one batch
    keys = ("name", "device", "batch", "runs", "median_s", "us_per_image")
    return [{key: row[key] for key in keys} for row in rows]


def peer_cases(images: Tensor, devices: list, batch: int) -> tuple[list[Case], list[str]]:
    """The cases of the peers that are installed, and the names of those that are not."""
    cases, absent = [], []
    for device in devices:
        for name, peer in PEERS.items():
            if device.type not in peer.devices:
                continue
            for size in [1] if peer.single else sorted({batch, min(1000, len(images))}):
                made = passes(name, peer, absent, images, size, device)
                if made is None:
                    break
                items, step = made
                count = affordable(peer_cost(items[0], step, size), len(images), size)
                items = items[: -(-count // size)]
                run = lambda items=items, step=step: map(step, items)  # noqa: E731
                head = name, device.type, "tensor", peer.dtype, size, count
                cases.append(Case(*head, run, "peer", peer.version()))
    return cases, absent


def peer_cost(item: Any, step: Callable, size: int) -> float:
    """Seconds an image; 0 where the peer fails, which its row will say."""
    try:
        return probe(step, item)[1] / size
    except Exception:  # a foreign library may raise anything
        return 0.0


def against(reference: Tensor) -> Callable:
    """A judge that compares with the ground truth of the same images."""

    def judge(case: Case, result: Tensor) -> tuple[dict[str, float], str]:
        target = reference[: len(result)]
        error = (result - target).abs()
        scores = {"max_abs_error": error.max().item()}
        scores["accuracy_0.95"] = metrics.accuracy(result, target, 0.95)
        if case.kind == "peer":
            scores |= fidelity(255 * error)
        wrong = case.kind == "chain" and not scores["max_abs_error"] <= TOLERANCE
        return scores, f"wrong: off by {scores['max_abs_error']:.2g}" if wrong else ""

    return judge
