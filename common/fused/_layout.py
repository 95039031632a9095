"""Bands as the kernels take them: csrc/fused.h says how they lie in memory. Prepared once for each
Bands, type and device, and kept with it; those of an Axis once for each length."""

import os
import threading
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .axes import Axis, Steps, Variant, each_bands_of
from .bands import CPU, Bands, resize, stack

LANES = 16  # csrc/fused.h: kLanes, kHalf, HalfGroup
# of a group's first three rows, what says where pixels lie: first, and low and high of each half
_SHIFTED = np.array([[1] * 16, [0] * 16, 2 * [1, 1, *[0] * 6]], np.int32)
KEPT_BYTES = 2**25  # of _memory: 3,000 lengths that become 224 pixels
_places: dict[tuple, dict] = {}  # of (steps, wide): by length, where the table lies in _memory
_kept: dict[tuple, dict] = {}  # of (steps, wide, device): the same as tensors, of single variants


def fork_safe_lock() -> threading.Lock:
    """A lock that is free in a child of fork, whichever thread of the parent held it."""
    made = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made._at_fork_reinit)
    return made


class _Memory:
    """One buffer for all kept tables. A table of its own could take the heap block that a result
    has left. The next result would not fit there and need new pages, which the system clears."""

    def __init__(self) -> None:
        self.lock = fork_safe_lock()
        self.memory, self.used = np.empty(0, np.int32), 0

    def keep(self, table: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Copies the table; returns the memory, and from where to where it lies there."""
        with self.lock:
            if self.used + table.size > self.memory.size:
                _places.clear()
                _kept.clear()
                self.memory, self.used = np.empty(max(KEPT_BYTES // 4, table.size), np.int32), 0
            memory, start, stop = self.memory, self.used, self.used + table.size
            self.used = stop
        memory[start:stop] = table.ravel()
        return memory, start, stop


_memory = _Memory()


def modes() -> bool:
    """Whether a mode is on in this thread that makes other tensors or changes the arithmetic: fake
    tensors, functorch, a trace, autocast. Every call asks; the private names are faster."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
    )


def aside(function, *arguments):
    """function(*arguments) as if none of this thread's modes were on: what is kept must be no
    tensor of `modes`, and no inference tensor."""
    if not modes():
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments)
    result = []

    def run() -> None:
        try:
            result.append((function(*arguments), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)  # which has no modes
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def packed(bands: Bands, wide: bool, device: torch.device) -> Tensor:
    """(variants, groups, 3 + taps, LANES) int32: first, count and spans of LANES output pixels, and
    their weights as the bits of float32; if wide of float64, in twice as many rows."""
    kept = bands.__dict__.setdefault("_packed", {})
    key = wide, device
    if key not in kept:
        pack = _pack_axis if isinstance(bands, Axis) else _pack_bands
        kept[key] = pack(bands, wide, device)
    return kept[key]


def adjoint(bands: Bands) -> Bands:
    if "_adjoint" not in bands.__dict__:
        bands.__dict__["_adjoint"] = aside(bands.transposed)
    return bands.__dict__["_adjoint"]


def _pack(bands: Bands, wide: bool) -> Tensor:
    # by numpy: of arrays as small as these it takes a third of torch's time
    variants, out = bands.first.shape
    first, count, weight = (x.numpy(force=True) for x in (bands.first, bands.count, bands.weight))
    if out % LANES:  # the lanes behind the last output pixel repeat it
        taken = np.arange(out + -out % LANES).clip(max=out - 1)
        first, count, weight = (x[:, taken] for x in (first, count, weight))
    groups, half = -(-out // LANES), LANES // 2
    first, count = (x.astype(np.int32).reshape(variants, groups, 2, half) for x in (first, count))
    empty = count == 0
    low = np.where(empty, bands.size, first).min(-1)
    high = np.where(empty, 0, first + count).max(-1)
    low = np.minimum(low, high)
    first = np.where(empty, low[..., None], first)
    # where neighbours are one pixel apart but for one step of two, from lane `late` on
    apart = first - first[..., :1]
    way = np.where(apart[..., -1] >= 0, 1, -1)
    late = apart * way[..., None] - np.arange(half)
    regular = (np.diff(late) >= 0).all(-1) & (late[..., -1] <= 1)
    steps = np.where(regular, half - late.sum(-1), 0)
    spans = low, high, count.min(-1), count.max(-1), first.max(-1) - low, steps * way
    weight = weight.reshape(variants, groups, LANES, -1).swapaxes(2, 3)
    weight = weight.astype(np.float64 if wide else np.float32, order="C").view(np.int32)
    weight = weight.reshape(variants, groups, -1, LANES)
    table = np.zeros((variants, groups, 3 + weight.shape[2], LANES), np.int32)
    for row, part in enumerate((first, count)):
        table[:, :, row] = part.reshape(variants, groups, LANES)
    for place, part in enumerate(spans):
        table[:, :, 2, place::half] = part
    table[:, :, 3:] = weight
    return torch.from_numpy(table)


def _pack_bands(bands: Bands, wide: bool, device: torch.device) -> Tensor:
    def pack() -> Tensor:
        if device.type != "cpu":  # on the CPU the operator checks the packed ones
            first, count = bands.first, bands.count
            beyond = (count > 0) & ((first < 0) | (first + count > bands.size))
            if (beyond | (count < 0) | (count > bands.weight.shape[2])).any():
                raise RuntimeError(f"separable_map: the bands reach beyond the {bands.size} pixels")
        return _pack(bands, wide).to(device)

    return aside(pack)


def _pack_axis(axis: Axis, wide: bool, device: torch.device) -> Tensor:
    """The same, made of the tables of the axis' lengths, moved to where its variants start."""
    (start, length, steps), *more = axis.variants
    if start or more:
        return aside(_moved, axis, wide).to(device)
    kept = _kept.setdefault((steps, wide, device), {})
    table = kept.get(length)
    if table is None:
        table = kept[length] = aside(_single, axis, wide, device)
    return table


def _single(axis: Axis, wide: bool, device: torch.device) -> Tensor:
    (place,) = _places_of(axis.variants, wide)
    # a copy, as a part would keep all of the memory; and `to` last, which waits for the device: the
    # next call may be on another stream
    return torch.from_numpy(_at(place, axis)[None]).clone().to(device)


def _moved(axis: Axis, wide: bool) -> Tensor:
    parts = [_at(place, axis) for place in _places_of(axis.variants, wide)]
    most = max(part.shape[1] for part in parts)
    shape = len(parts), parts[0].shape[0], most, LANES
    table = torch.zeros(shape, dtype=torch.int32, device=CPU)
    rooms = table.numpy()  # by numpy, as such small parts take torch longer
    for part, room in zip(parts, rooms, strict=True):
        room[:, : part.shape[1]] = part
    starts = np.array([start for start, _, _ in axis.variants], np.int32)
    rooms[:, :, :3] += (starts[:, None, None] * _SHIFTED)[:, None]
    return table


def _at(place: tuple[np.ndarray, int, int], axis: Axis) -> np.ndarray:
    """The table there: (groups, 3 + taps, LANES)."""
    memory, start, stop = place
    return memory[start:stop].reshape(-(-axis.out // LANES), -1, LANES)


def _places_of(variants: list[Variant], wide: bool) -> list[tuple[np.ndarray, int, int]]:
    """Where the table of each variant is, as it were at 0."""
    places = {}  # by the steps' id, as the few that there are take long to hash
    for _, _, steps in variants:
        if id(steps) not in places:
            places[id(steps)] = _places.setdefault((steps, wide), {})
    try:
        return [places[id(steps)][length] for _, length, steps in variants]
    except KeyError:
        for steps in {id(steps): steps for _, _, steps in variants}.values():
            lengths = {length for _, length, each in variants if each is steps}
            _add(places[id(steps)], lengths.difference(places[id(steps)]), steps, wide)
        return [places[id(steps)][length] for _, length, steps in variants]


def _add(places: dict, lengths: set[int], steps: Steps, wide: bool) -> None:
    """The tables of these lengths."""
    together = steps and steps[0][0] == "resize"
    for some in [list(lengths)] if together and lengths else [[length] for length in lengths]:
        bands = each_bands_of(some, steps)
        table = _pack(bands, wide).numpy()
        for length, part, taps in zip(some, table, bands.count.amax(1), strict=True):
            rows = 3 + max(int(taps), 1) * (2 if wide else 1)
            places[length] = _memory.keep(part[:, :rows])


def sizes_tensor(*sizes: int) -> Tensor:
    # aside takes longer than this, and no derivative needs the sizes
    return aside(sizes_tensor, *sizes) if modes() else torch.from_numpy(np.array(sizes, np.int64))


class Plan:
    """The bands of both axes for images of one type and device."""

    def __init__(self, rows: Bands, columns: Bands, wide: bool, device: torch.device) -> None:
        self.bands, self.wide, self.device = (rows, columns), wide, device
        self.tables = packed(rows, wide, device), packed(columns, wide, device)
        self.numbers = rows.size, columns.size, rows.out, columns.out
        self.sizes = sizes_tensor(*self.numbers)

    def transposed(self) -> tuple[Tensor, Tensor]:
        return tuple(packed(adjoint(bands), self.wide, self.device) for bands in self.bands)


@lru_cache(maxsize=64)
def chain_plan(h, w, height, width, hflip, vflip, wide, device) -> Plan:
    """The plan of fused_transform. A flip of None: one for each image."""
    if h < 1 or w < 1:
        raise ValueError(f"fused_transform: images must have at least one pixel, not {h} x {w}")
    for name, length in (("height", height), ("width", width)):
        if not isinstance(length, int):
            raise TypeError(f"fused_transform: size: '{name}' must be an integer, not {length!r}")
    if not (1 <= height < 2**30 and 1 <= width < 2**30):
        raise ValueError(
            "fused_transform: size must be two positive integers below 2**30, not "
            f"({height}, {width})"
        )
    return aside(_chain_plan, h, w, height, width, hflip, vflip, wide, device)


def _chain_plan(h, w, height, width, hflip, vflip, wide, device) -> Plan:
    def axis(size: int, out: int, flip: bool | None) -> Bands:
        bands = resize(size, out, dtype=torch.float64 if wide else torch.float32)
        if flip is None:
            return stack([bands, bands.flipped()])
        return bands.flipped() if flip else bands

    return Plan(axis(h, height, vflip), axis(w, width, hflip), wide, device)
