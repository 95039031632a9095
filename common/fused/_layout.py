"""Bands as the kernels take them: csrc/fused.h says how they lie in memory. Prepared once for each
Bands, type and device, and kept with it."""

import threading
from functools import lru_cache

import torch
from torch import Tensor

from .bands import CPU, Bands, Boxes, of_lengths, resize, stack

LANES = 16  # csrc/fused.h: kLanes, kHalf, HalfGroup
# of a group's first three rows, what says where pixels lie: first, and low and high of each half
_PLACES = torch.tensor([[1] * 16, [0] * 16, 2 * [1, 1, *[0] * 6]], dtype=torch.int32, device=CPU)
KEPT_BYTES, KEPT_KINDS = 2**24, 16  # of _kept: 2,000 lengths that become 224 pixels
_kept: dict[tuple, dict] = {}  # for each kind of resize: (length, flipped) and their table


def modes() -> bool:
    """Whether a mode of this thread makes other tensors than plain ones: fake ones, or those of a
    functorch level. Asked in each call, so in private names, which cost less."""
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
    table = kept.get(key)
    if table is None:
        if isinstance(bands, Boxes) and bands.start == [0]:
            table = _pack_length(bands.how, bands.length[0], bands.flips[0], wide, device)
        else:
            pack = _pack_boxes if isinstance(bands, Boxes) else _pack
            table = aside(lambda: pack(bands, wide).to(device))
        kept[key] = table
    return table


def adjoint(bands: Bands) -> Bands:
    if "_adjoint" not in bands.__dict__:
        bands.__dict__["_adjoint"] = aside(bands.transposed)
    return bands.__dict__["_adjoint"]


def _pack(bands: Bands, wide: bool) -> Tensor:
    variants, out = bands.first.shape
    first, count, weight = bands.first, bands.count, bands.weight
    if out % LANES:  # the lanes behind the last output pixel repeat it
        taken = torch.arange(out + -out % LANES, device=CPU).clamp(max=out - 1)
        first, count, weight = (x[:, taken] for x in (first, count, weight))
    groups, taps = -(-out // LANES), weight.shape[2]
    # the lanes outermost: their loops over memory are long ones
    first, count = (
        x.to(torch.int32).view(variants, groups, 2, LANES // 2).movedim(-1, 0).contiguous()
        for x in (first, count)
    )
    empty = count == 0
    low = first.masked_fill(empty, bands.size).amin(0)
    high = (first + count).masked_fill_(empty, 0).amax(0)
    low = low.minimum(high)
    first = first.where(~empty, low)
    # where neighbours are one pixel apart but for one step of two, from lane `late` on
    apart = first - first[0]
    way = (apart[-1] >= 0).to(torch.int32) * 2 - 1
    lane = torch.arange(LANES // 2, dtype=torch.int32, device=CPU)
    late = apart * way - lane[:, None, None, None]
    regular = (late.diff(dim=0).amin(0) >= 0) & (late[-1] <= 1)
    steps = (LANES // 2 - late.sum(0, dtype=torch.int32)).where(regular, 0)
    spread, none = first.amax(0) - low, torch.zeros_like(low)
    spans = low, high, count.amin(0), count.amax(0), spread, steps * way, none, none
    rows = taps * (2 if wide else 1)
    table = torch.empty(variants, groups, 3 + rows, LANES, dtype=torch.int32, device=CPU)
    heads = first.movedim(0, -1), count.movedim(0, -1), torch.stack(spans, -1)
    for row, part in enumerate(heads):
        table[:, :, row] = part.flatten(2)
    weights = table[:, :, 3:].view(torch.float64 if wide else torch.float32)
    weights = weights.view(variants, groups, taps, LANES)
    weights.copy_(weight.unflatten(1, (groups, LANES)).mT)
    return table


def _pack_boxes(bands: Boxes, wide: bool) -> Tensor:
    """The same of boxes: the tables of their lengths, moved to where the boxes start."""
    kept = _kept.get((wide, bands.how), {})
    keys = list(zip(bands.length, bands.flips, strict=True))
    try:
        tables = [kept[key] for key in keys]
    except KeyError:
        # a new dictionary, as other threads read the old one
        kept = _kept[wide, bands.how] = _with_lengths(kept, set(keys), bands, wide)
        tables = [kept[key] for key in keys]
    table = torch.stack(tables)
    start = torch.tensor(bands.start, dtype=torch.int32, device=CPU)
    table[:, :, :3] += (start[:, None, None] * _PLACES)[:, None]
    return table


@lru_cache(maxsize=2048)
def _pack_length(how: tuple, length: int, flip: bool, wide: bool, device: torch.device) -> Tensor:
    """The same of a whole image of this length, for random crops of single images."""
    return aside(lambda: _pack(of_lengths(how, [length], flip), wide).to(device))


def _with_lengths(kept: dict, keys: set, bands: Boxes, wide: bool) -> dict:
    """kept and the tables of the keys that it lacks; without its others where there is no room."""
    made = {}
    for flip in (False, True):
        missing = [key for key in keys.difference(kept) if key[1] == flip]
        if missing:
            tables = _pack(of_lengths(bands.how, [length for length, _ in missing], flip), wide)
            made.update(zip(missing, tables, strict=True))
    # all with room for the same number of taps, each in memory of its own
    rows = max(table.shape[1] for table in (*made.values(), *list(kept.values())[:1]))
    size = next(iter(made.values()))[:, :1].nbytes * rows
    if (len(kept) + len(made)) * size > KEPT_BYTES or len(_kept) > KEPT_KINDS:
        _kept.clear()
        kept = {key: kept[key] for key in keys.intersection(kept)}
    return {
        key: torch.nn.functional.pad(table, (0, 0, 0, rows - table.shape[1])).clone()
        if key in made or table.shape[1] < rows
        else table
        for key, table in (kept | made).items()
    }


def _sizes_tensor(*sizes: int) -> Tensor:
    # no aside where it is the larger part: nothing is derived from the sizes
    return aside(_sizes_tensor, *sizes) if modes() else torch.tensor(sizes, device=CPU)


sizes_tensor = lru_cache(maxsize=256)(_sizes_tensor)


class Plan:
    """The bands of both axes for images of one type and device."""

    def __init__(self, rows: Bands, columns: Bands, wide: bool, device: torch.device) -> None:
        self.bands, self.wide, self.device = (rows, columns), wide, device
        self.tables = packed(rows, wide, device), packed(columns, wide, device)
        self.numbers = rows.size, columns.size, rows.out, columns.out
        drawn = isinstance(rows, Boxes)  # so its sizes hardly come again
        self.sizes = (_sizes_tensor if drawn else sizes_tensor)(*self.numbers)

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
