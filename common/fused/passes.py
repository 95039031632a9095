"""What a chain of linear steps does to an image, gathered into passes of the operator."""

import platform
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import bands as b
from . import colour
from .bands import CPU, Bands

# added before rounding to nearest, ties to even: to round down (gray levels are multiples of 1e-4),
# and to round ties up
FLOOR, HALF_UP = -0.5 + 5e-5, 2e-5


@dataclass(frozen=True, eq=False)
class Pass:
    """The arguments of one `separable_map`; box: the part of the images that it sees."""

    rows: Bands
    columns: Bands
    mix: Tensor
    table: Tensor | None
    row_index: Tensor | None
    column_index: Tensor | None
    dtype: torch.dtype
    box: tuple[int, int, int, int] | None  # top, left, height, width


class Passes:
    """An image on its way through the chain: its kind, dtype and size after the steps so far, and
    the passes that take it there. The steps gather in one pass as long as the result stays
    torchvision's; `finish` ends a pass.

    Where torchvision rounds uint8 once, the pass does not, and is within one level. Where it rounds
    more often (`exact`), each rounding ends a pass, as the errors would add up to more than that.
    """

    def __init__(self, pil: bool, pure: bool, dtype, shape, exact: bool = False) -> None:
        self.pil, self.dtype, self.exact = pil, dtype, exact
        self.channels, self.height, self.width = shape
        self.pure = pure  # a plain tensor, no tv_tensor
        self.result: type | None = None  # of the output; None: that of the input
        self.roundings = 0  # how often torchvision rounds uint8 on the way
        self.done: list[Pass] = []
        self._begin(dtype)

    def _begin(self, source: torch.dtype) -> None:
        self.source = source  # dtype of what the pass reads
        self.axes: list[Bands | None] = [None, None]  # rows, columns; None: as they are
        self.index: list[Tensor | None] = [None, None]  # which variant each item takes
        self.box: tuple[int, int, int, int] | None = None
        self.inputs, self.colours = self.channels, ()  # see `colour`
        self.clamped = False
        self.touched = self.sparse = self.rounds = self.floors = self.half_up = False

    def finish(self, dtype: torch.dtype) -> None:
        """Ends the pass; its result is of this dtype."""
        if not self.touched and dtype == self.source:
            return
        sizes = self.height, self.width
        rows, columns = (bands or b.identity(n) for bands, n in zip(self.axes, sizes, strict=True))
        round_by = 0.0
        if dtype == torch.uint8:
            round_by = FLOOR if self.floors else HALF_UP if self.half_up else 0.0
        mix, table = colour.tensors(self.inputs, self.colours, round_by)
        self.done.append(Pass(rows, columns, mix, table, *self.index, dtype, self.box))
        self._begin(dtype)

    # along the axes

    def _then(self, axis: int, bands: Bands) -> None:
        if len(bands) > 1:
            self._each(axis)
            self.index[axis] = torch.arange(len(bands), device=CPU)
        before = self.axes[axis]
        self.axes[axis] = bands if before is None else before.then(bands)
        self.touched = True

    def _each(self, axis: int) -> None:
        """Where the items differ: a variant for each."""
        if self.index[axis] is not None:
            self.axes[axis] = self.axes[axis].select(self.index[axis])
            self.index[axis] = torch.arange(len(self.axes[axis]), device=CPU)

    def _blend(self, rows: Bands, columns: Bands) -> None:
        """Bands that mix pixels: what was clamped, or what these would read beyond torch, is a pass
        of its own."""
        gaps = self.sparse and any(
            mine is not None and (len(mine) > 1 or mine.gaps(new))
            for mine, new in zip(self.axes, (rows, columns), strict=True)
        )
        if self.clamped or gaps:
            self.finish(self.dtype)
        self._then(0, rows)
        self._then(1, columns)

    def _round(self) -> None:
        """torchvision rounds uint8 after the step that begins here."""
        if self.dtype == torch.uint8:
            self.roundings += 1
            if self.exact and self.rounds:
                self.finish(torch.uint8)
            self.rounds = self.touched = True

    def crop(self, top, left, height: int, width: int, fill=(0.0,), mode="constant") -> None:
        """top, left: ints, or int64 (items,). Beyond the image lies `fill` (one value, or one for
        each channel), or the image continued as mode says."""
        old = self.height, self.width
        if isinstance(top, int) and isinstance(left, int):
            inside = top >= 0 and left >= 0 and top + height <= old[0] and left + width <= old[1]
            if inside and self.axes == [None, None]:  # a view of the images, whatever their strides
                shift = self.box or (0, 0)
                self.box = shift[0] + top, shift[1] + left, height, width
                self.height, self.width = height, width
                self.touched = True
                return
        fill = list(fill)
        boxes = [torch.as_tensor(start, device=CPU) for start in (top, left)]
        outside = any(
            bool((start < 0).any() or (start + length > size).any())
            for start, length, size in zip(boxes, (height, width), old, strict=True)
        )
        fill = fill * self.channels if len(fill) == 1 else fill
        bias = colour.product(self.inputs, self.colours)[1]
        inner = outside and mode == "constant" and fill != list(bias)
        if inner:  # the operator gives the bias there: let it be the fill
            if self.rounds and self.dtype == torch.uint8:
                self.finish(torch.uint8)
            self.scale((1.0,), tuple(-x for x in fill))
            self.finish(torch.float32 if self.dtype == torch.uint8 else self.dtype)
        for axis, (start, length) in enumerate(zip(boxes, (height, width), strict=True)):
            self._then(axis, b.crop(old[axis], start, length, mode))
        self.height, self.width = height, width
        if inner:
            self.scale((1.0,), tuple(fill))

    def flip(self, axis: int, mask: Tensor | None = None) -> None:
        """axis: 0 flips upside down, 1 left to right. mask: bool (items,), which items,
        more than one."""
        self.touched = True
        bands = self.axes[axis] or b.identity((self.height, self.width)[axis])
        if mask is None:
            self.axes[axis] = bands.flipped()
        elif len(bands) == 1:
            self.axes[axis] = b.stack([bands, bands.flipped()])
            self.index[axis] = mask.to(torch.int64)
        else:
            self._each(axis)
            self.axes[axis] = self.axes[axis].flipped_where(mask)

    def resize(self, height, width, mode, antialias, *, boxes=None, native=True) -> None:
        """boxes: lists of top, left, height and width: what to resize of each item. native: False
        where torchvision resizes uint8 as float32, rounded once."""
        old, new = (self.height, self.width), (height, width)
        if boxes is None and old == new:
            return
        self._round()
        levels = self.dtype == torch.uint8
        native &= levels and (self.pil or _resizes_uint8(mode))
        clamps = levels and mode == "bicubic"
        if clamps and native:
            self.roundings += 1  # never in one pass
        dtype = torch.float64 if self.dtype == torch.float64 or native else torch.float32
        make = b.resize_axes(old, new, mode, antialias, dtype, self.channels, boxes)
        if native and self.exact:
            make = [b.quantized(bands, 30 if self.pil else 15) for bands in make]
            if old[0] != height and old[1] != width:
                self._blend(b.identity(old[0]), make[1])  # torch resizes the rows first
                self.width, make[1] = width, b.identity(width)
                self.half_up = True
                self.finish(torch.uint8)
            self.rounds = self.half_up = True
        self._blend(*make)
        self.height, self.width = new
        self.sparse |= not antialias and not levels
        if clamps:
            self.colours += (("clamp", 0.0, 255.0),)
            self.clamped = True

    def blur(self, kernel_size, sigma) -> None:
        """kernel_size, sigma: (width, height)."""
        self._round()
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        self._blend(
            b.blur(self.height, kernel_size[1], sigma[1], dtype),
            b.blur(self.width, kernel_size[0], sigma[0], dtype),
        )

    # across the channels

    def gray(self, weights: tuple[float, ...], copies: int, floors: bool) -> None:
        """copies channels, each the weighted sum of all. floors: torchvision cuts off uint8."""
        if len(weights) > 1:
            self._round()
            if self.clamped:
                self.finish(self.dtype)
            self.floors = floors and self.dtype == torch.uint8
        self.colours += (("gray", weights, copies),)
        self.channels, self.touched = copies, True

    def scale(self, factor: tuple[float, ...], shift: tuple[float, ...]) -> None:
        """factor * values + shift: one number for all channels, or one for each."""
        self.colours += (("scale", factor, shift),)
        self.touched = True

    def cast(self, dtype: torch.dtype, scaled: bool) -> None:
        """To a float dtype, uint8 divided by 255 if scaled."""
        if self.dtype == torch.uint8:
            if self.exact and self.rounds:
                self.finish(torch.uint8)
            if scaled:
                self.scale((1 / 255,), (0.0,))
        self.touched |= dtype != self.dtype
        self.dtype = dtype


@lru_cache
def _resizes_uint8(mode: str) -> bool:
    """Whether torchvision resizes uint8 tensors on this CPU as such, not as float32."""
    arm = platform.machine() in ("aarch64", "arm64")
    return mode == "bicubic" or arm or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
