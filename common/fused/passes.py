"""What a chain of linear steps does to an image, gathered into passes of the operator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bands as b
from .bands import CPU, Bands
from .operator import affine

FLOOR = -0.5 + 5e-5  # rounding to nearest rounds down: gray levels are multiples of 1e-4 apart


@dataclass(frozen=True, eq=False)
class Pass:
    """The arguments of one `separable_map`."""

    rows: Bands
    columns: Bands
    mix: Tensor
    table: Tensor | None
    row_index: Tensor | None
    column_index: Tensor | None
    dtype: torch.dtype


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
        self.sizes: list[tuple[int, int]] = []
        self.done: list[Pass] = []
        self._begin(dtype)

    def _begin(self, source: torch.dtype) -> None:
        self.source = source  # dtype of what the pass reads
        self.axes: list[Bands | None] = [None, None]  # rows, columns; None: as they are
        self.index: list[Tensor | None] = [None, None]  # which variant each item takes
        self.mix = torch.eye(self.channels, dtype=torch.float64, device=CPU)
        self.bias = torch.zeros(self.channels, dtype=torch.float64, device=CPU)
        self.low = self.high = None  # (channels,): where the result is to be clamped
        self.touched = self.sparse = self.rounds = self.floors = False

    def finish(self, dtype: torch.dtype) -> None:
        """Ends the pass; its result is of this dtype."""
        if not self.touched and dtype == self.source:
            return
        sizes = self.height, self.width
        rows, columns = (
            bands or b.identity(n) for bands, n in zip(self.axes, sizes, strict=True)
        )
        bias = self.bias + (FLOOR if self.floors and dtype == torch.uint8 else 0)
        plain = self.low is None and not bool(bias.any())
        table = None if plain else affine(len(self.mix), bias, self.low, self.high)
        self.done.append(Pass(rows, columns, self.mix, table, *self.index, dtype))
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
        gaps = False
        for axis, bands in enumerate((rows, columns)):
            if self.sparse and self.axes[axis] is not None:
                self._each(axis)
                gaps |= self.axes[axis].gaps(bands)
        if self.low is not None or gaps:
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

    def crop(self, top, left, height: int, width: int, fill=0.0, mode: str = "constant") -> None:
        """top, left: ints, or int64 (items,). Beyond the image lies `fill` (one value, or one for
        each channel), or the image continued as mode says."""
        old = self.height, self.width
        boxes = [torch.as_tensor(start, device=CPU) for start in (top, left)]
        outside = any(
            bool((start < 0).any() or (start + length > size).any())
            for start, length, size in zip(boxes, (height, width), old, strict=True)
        )
        fill = torch.as_tensor(fill, dtype=torch.float64, device=CPU).expand(len(self.mix))
        inner = outside and mode == "constant" and not torch.equal(fill, self.bias)
        if inner:  # the operator gives the bias there: let it be the fill
            if self.rounds and self.dtype == torch.uint8:
                self.finish(torch.uint8)
            self.scale(1, -fill)
            self.finish(torch.float32 if self.dtype == torch.uint8 else self.dtype)
        for axis, (start, length) in enumerate(zip(boxes, (height, width), strict=True)):
            self._then(axis, b.crop(old[axis], start, length, mode))
        self.height, self.width = height, width
        if inner:
            self.scale(1, fill)

    def flip(self, axis: int, mask: Tensor | None = None) -> None:
        """axis: 0 flips upside down, 1 left to right. mask: bool (items,), which items."""
        if mask is not None and len(mask) == 1:
            if not bool(mask):
                return
            mask = None
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

    def resize(self, height, width, mode, antialias, *, native=True, boxes=None) -> None:
        """native: torchvision resizes uint8 as such, rounded and clamped after each axis; without,
        as float32. boxes: (top, left, height, width), int64 (items,) each: what to resize."""
        old = self.height, self.width
        self.height, self.width = height, width
        self.sizes.append((height, width))
        if boxes is None and old == (height, width):
            return
        self._round()
        levels = self.dtype == torch.uint8
        clamps = levels and mode == "bicubic"
        if clamps and native:
            self.roundings += 1  # never in one pass
        wide = self.dtype == torch.float64 or (levels and native)
        dtype = torch.float64 if wide else torch.float32
        top, left, tall, broad = boxes or [None] * 4
        make = [
            b.resize(old[0], height, mode, antialias, dtype, start=top, length=tall),
            b.resize(old[1], width, mode, antialias, dtype, start=left, length=broad),
        ]
        if levels and native and self.exact and old[0] != height and old[1] != width:
            self._blend(b.identity(old[0]), make[1])  # torch resizes the rows first
            self.height = old[0]
            self.finish(torch.uint8)
            self.height, make[1] = height, b.identity(width)
            self.rounds = True
        self._blend(*make)
        self.sparse |= not antialias and self.dtype != torch.uint8
        if clamps:
            self.low = torch.zeros(len(self.mix), dtype=torch.float64, device=CPU)
            self.high = self.low + 255

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
            if self.low is not None:
                self.finish(self.dtype)
            self.floors = floors and self.dtype == torch.uint8
        matrix = torch.tensor([weights] * copies, dtype=torch.float64, device=CPU)
        self.mix, self.bias = matrix @ self.mix, matrix @ self.bias
        if self.low is not None:
            self.low, self.high = self.low.expand(copies), self.high.expand(copies)
        self.channels, self.touched = copies, True

    def scale(self, factor, shift) -> None:
        """factor * values + shift; each a number, or one for each channel."""
        factor, shift = (
            torch.as_tensor(x, dtype=torch.float64, device=CPU).expand(len(self.mix))
            for x in (factor, shift)
        )
        self.mix = factor[:, None] * self.mix
        self.bias = factor * self.bias + shift
        if self.low is not None:
            ends = torch.stack([self.low, self.high]) * factor + shift
            self.low, self.high = ends.amin(0), ends.amax(0)
        self.touched = True

    def cast(self, dtype: torch.dtype, scaled: bool) -> None:
        """To a float dtype, uint8 divided by 255 if scaled."""
        if self.dtype == torch.uint8:
            if self.exact and self.rounds:
                self.finish(torch.uint8)
            if scaled:
                self.scale(1 / 255, 0)
        self.touched |= dtype != self.dtype
        self.dtype = dtype
