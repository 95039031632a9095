"""How bench.py times. Each case is bounded in time and its result compared before it is timed; the
cases then run in turns, so that a disturbance meets all of them; a run is the mean of a few passes,
turns apart; what remains is the median and the interquartile range of the runs. On a GPU, device
time between two events behind a flushed L2 cache."""

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SEQUENTIAL, BATCHED = "torchvision sequential", "torchvision batched"
LEAST_RUNS = 5  # a slow case makes fewer passes than asked for, but never fewer than these
REPORT = 3  # budgets for a case of the report's protocol, whose passes cannot take fewer images
# Passes of a run on the CPU. A core that is shared is slow for a second, then fast again: of single
# passes the median is that of whichever state came more often.
PASSES = 2
NOISY = 0.1  # an IQR of more than this share of the median is marked


@dataclass(frozen=True)
class Case:
    """What is timed. run: starts a pass, which yields one result for each item; all that it does
    lies within the clock. kind: "chain" must equal the reference, "net" and "peer" need not,
    "part" is only a part of the work. skip: the reason why it is not timed."""

    name: str
    device: str
    protocol: str
    dtype: str
    batch: int
    images: int
    run: Callable[[], Iterator]
    kind: str = "chain"
    note: str = ""
    skip: str = ""
    bytes_moved: int = 0  # that a pass must read and write
    shape: tuple[int, ...] = (1, 28, 28)  # of one result
    synchronised: bool = True  # False: the clock does not wait for the GPU's last kernels


@dataclass
class Timing:
    """What was found of a case. Without `times` it has none, and the note says why."""

    case: Case
    note: str = ""
    failed: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    once: float = 0.0  # roughly the seconds of a pass
    passes: int = 0
    inner_loops: int = 1  # passes that are timed together, where one is too short for the clock
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


# A judge takes a case and the tensor of all its results, and returns its scores, and what is wrong
# with it or "".
Judge = Callable[[Case, Tensor], tuple[dict[str, float], str]]


def reason(error: Exception) -> str:
    """An exception as one line."""
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]


def grad_mode(case: Case) -> Any:
    """The report's nets ran under no_grad; everything else runs without autograd's bookkeeping."""
    return torch.no_grad() if case.protocol == "report" else torch.inference_mode()


def probe(step: Callable, images: Any) -> tuple[float, float]:
    """Seconds of the first call, which may compile something, and of the fastest of three more."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.inference_mode():
            step(images)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def check(case: Case, judge: Judge) -> Timing:
    """Runs a case once, after one item that may compile something, and judges its result. A case
    that fails, or whose result must be right and is wrong, is marked and not timed."""
    timing = Timing(case, case.skip or case.note, failed=bool(case.skip))
    if case.skip:
        return timing
    try:
        with grad_mode(case):
            next(iter(case.run()))
            torch.manual_seed(0)
            start = time.perf_counter()
            parts = [as_tensor(result) for result in case.run()]
    except Exception as error:  # one row's failure costs that row
        timing.failed, timing.note = True, reason(error)
        return timing
    timing.once = time.perf_counter() - start
    if case.kind != "part":
        result = torch.cat([part.reshape(-1, *case.shape) for part in parts])
        timing.scores, wrong = judge(case, result)
        if wrong:
            timing.failed, timing.note = True, wrong
    return timing


def as_tensor(result: Any) -> Tensor:
    """A copy on the CPU in float32, uint8 scaled to [0, 1]; the case may write its next result over
    this one."""
    if not isinstance(result, Tensor):
        result = torch.from_numpy(np.array(result))
    result = result.cpu().clone()
    return result / 255 if result.dtype == torch.uint8 else result.float()


def fidelity(levels: Tensor) -> dict[str, float]:
    """levels: absolute differences in levels of uint8. Equal: within half a level."""
    return {
        "equal_share": (levels <= 0.5).double().mean().item(),
        "mean_levels": levels.double().mean().item(),
        "max_levels": levels.max().item(),
    }


def seconds(timing: Timing) -> float:
    """Seconds of one pass. Before it runs a garbage collection in the report's protocol, elsewhere
    an untimed item, since the previous case has filled the caches."""
    case, cuda = timing.case, timing.case.device == "cuda"
    with grad_mode(case):
        if case.protocol == "report":
            gc.collect()
        else:
            next(iter(case.run()))
        if cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # larger than any L2
            torch.cuda.synchronize()
            events[0].record()
        start = time.perf_counter()
        for _ in range(timing.inner_loops):
            deque(case.run(), maxlen=0)  # drops each result
        host = time.perf_counter() - start
        if cuda:
            events[1].record()
            torch.cuda.synchronize()
        whole = time.perf_counter() - start if case.synchronised else host
    if cuda and case.protocol != "report":
        calls = timing.inner_loops * -(-case.images // case.batch)
        timing.host.append(host / calls)
        whole = events[0].elapsed_time(events[1]) / 1e3
    return whole / timing.inner_loops


def measure(timings: list[Timing], runs: int, budget: float) -> None:
    """Fills `times`. The cases make their passes in turns; a run is the mean of PASSES of them (on
    a GPU: one pass). A case whose passes would take more than `budget` seconds in all (`report`:
    REPORT times that) takes part in some turns only, spread over the whole time."""
    turns = PASSES * runs
    for timing in timings:
        if timing.once < 1:  # else `check` has taken long enough to know
            timing.once = max(seconds(timing), 1e-9)
        most = runs if timing.case.device == "cuda" else turns
        affordable = budget * (REPORT if timing.case.protocol == "report" else 1) / timing.once
        timing.passes = max(min(LEAST_RUNS, runs), min(most, int(affordable)))
        timing.inner_loops = max(1, int(1e-3 / timing.once))
        timing.host.clear()
    for turn in tqdm(range(turns), "timing", leave=False, disable=None):
        for timing in timings:
            if turn * timing.passes % turns < timing.passes:
                timing.times.append(seconds(timing))
    for timing in timings:
        parts = np.array_split(timing.times, min(runs, timing.passes))
        timing.times = [part.mean().item() for part in parts]


# --- what it comes to --------------------------------------------------------------------------


def summary(timing: Timing) -> dict[str, Any]:
    """The row as written to the JSON. The spread needs at least three runs."""
    case, times = timing.case, timing.times
    keys = ("name", "device", "protocol", "dtype", "batch", "images", "synchronised")
    row = {key: getattr(case, key) for key in keys} | {"runs": len(times)}
    keys = ("mean_s", "median_s", "iqr_s", "min_s", "images_per_s", "us_per_image")
    row |= dict.fromkeys((*keys, "host_us_per_call", "noisy"))
    row |= dict.fromkeys(("speedup", "speedup_sequential", "share_of_copy"))
    if times:
        low, median, high = np.percentile(times, (25, 50, 75)).tolist()
        spread = high - low if len(times) > 2 else None
        values = statistics.mean(times), median, spread, min(times)
        row |= dict(
            zip(keys, (*values, case.images / median, 1e6 * median / case.images), strict=True)
        )
        row["noisy"] = None if spread is None else spread > NOISY * median
        row["host_us_per_call"] = 1e6 * statistics.median(timing.host) if timing.host else None
    row |= dict.fromkeys(("max_abs_error", "accuracy_0.95"))
    row |= timing.scores
    row |= {"note": timing.note, "kind": case.kind, "peer": case.kind == "peer"}
    return row | {"bytes_moved": case.bytes_moved or None}


def fastest(rows: list[dict], name: str, like: dict) -> float | None:
    """Microseconds an image of the fastest row of that name on the device and in the protocol of
    the row `like`."""
    times = [
        row["us_per_image"]
        for row in rows
        if row["us_per_image"]
        and (row["name"], row["device"], row["protocol"])
        == (name, like["device"], like["protocol"])
    ]
    return min(times, default=None)


def add_ratios(rows: list[dict], batched: str = BATCHED, sequential: str = SEQUENTIAL) -> None:
    """Adds to each row its speed relative to torchvision in batches ("speedup") and image by image
    ("speedup_sequential"), each at its fastest on the same device in the same protocol; and its
    share of the bandwidth of the fastest copy ("share_of_copy")."""
    for row in rows:
        if row["median_s"] is None:
            continue
        for key, name in (("speedup", batched), ("speedup_sequential", sequential)):
            base = fastest(rows, name, row)
            row[key] = base / row["us_per_image"] if base else None
        copies = [r for r in rows if r["name"] == "copy" and r["median_s"] and r["bytes_moved"]]
        rates = [r["bytes_moved"] / r["median_s"] for r in copies if r["device"] == row["device"]]
        if row["bytes_moved"] and rates:
            row["share_of_copy"] = row["bytes_moved"] / row["median_s"] / max(rates)
