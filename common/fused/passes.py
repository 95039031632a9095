"""What a chain of linear steps does to an image, gathered into passes of the operator."""

from dataclasses import dataclass, field, replace

import PIL.Image
import torch
from torch import Tensor

from . import colour
from ._layout import Plan
from .axes import FLIP, Axis, Variant, bands_of, distinct, longer
from .bands import columns_first, resizes_uint8

# added before rounding to nearest, ties to even: to round down (gray levels are multiples of 1e-4),
# and to round ties up
FLOOR, HALF_UP = -0.5 + 5e-5, 2e-5


@dataclass(frozen=True, eq=False)
class Pass:
    """The arguments of one `apply_plan`; box: the part of the images that it sees."""

    rows: Axis
    columns: Axis
    mix: Tensor
    table: Tensor | None
    row_index: Tensor | None
    column_index: Tensor | None
    dtype: torch.dtype
    box: tuple[int, int, int, int] | None  # top, left, height, width
    plans: dict = field(default_factory=dict)  # by (wide, device)

    def cropped(self, *ranges: tuple[int, int]) -> "Pass":
        """The same pass, of whose result these rows and columns are wanted: starts and lengths."""
        axes = []
        for axis, (start, out) in zip((self.rows, self.columns), ranges, strict=True):
            if out != axis.out:
                step, shared = ("crop", start, out, "constant"), {}
                variants = [longer(each, step, True, shared) for each in axis.variants]
                axis = Axis(axis.size, out, variants)
            axes.append(axis)
        return replace(self, rows=axes[0], columns=axes[1], plans={})

    def plan(self, images: Tensor) -> Plan:
        key = torch.float64 in (images.dtype, self.dtype), images.device
        if key not in self.plans:
            self.plans[key] = Plan(self.rows, self.columns, *key)
        return self.plans[key]


class Passes:
    """An image on its way through the chain: its kind, dtype and size after the steps so far, and
    the passes that take it there. The steps gather in one pass as long as the result stays
    torchvision's; `finish` ends a pass.

    Where torchvision rounds uint8 once, the pass does not, and is within one level. Where it rounds
    more often (`exact`), each rounding ends a pass, as the errors would add up to more than that.
    """

    def __init__(self, kind: type, dtype, shape, exact: bool = False) -> None:
        self.kind, self.dtype, self.exact = kind, dtype, exact
        self.channels, self.height, self.width = shape
        self.pil = kind is PIL.Image.Image
        self.pure = kind is Tensor  # no tv_tensor
        self.result: type | None = None  # of the output; None: that of the input
        self.roundings = 0  # how often torchvision rounds uint8 on the way
        self.done: list[Pass] = []
        self._begin(dtype)

    def _begin(self, source: torch.dtype) -> None:
        self.source = source  # dtype of what the pass reads
        # of rows and columns, the variants: one, or one for each item
        self.axes: list[list[Variant]] = [[(0, n, ())] for n in (self.height, self.width)]
        self.read = self.height, self.width  # of what the pass reads
        self.inputs, self.colours = self.channels, ()  # see `colour`
        self.clamped = False
        self.touched = self.sparse = self.rounds = self.floors = self.half_up = False

    def finish(self, dtype: torch.dtype) -> None:
        """Ends the pass; its result is of this dtype."""
        if not self.touched and dtype == self.source:
            return
        box, read = None, self.read
        if all(len(axis) == 1 for axis in self.axes):  # a view, whatever the images' strides
            (top, height, down), (left, width, across) = (axis[0] for axis in self.axes)
            if (height, width) != read:
                if self.done:  # nobody reads the rest
                    self.done[-1] = self.done[-1].cropped((top, height), (left, width))
                else:
                    box = top, left, height, width
                read = height, width
            self.axes = [[(0, height, down)], [(0, width, across)]]
        (rows, row_index), (columns, column_index) = (
            distinct(*axis) for axis in zip(self.axes, read, (self.height, self.width), strict=True)
        )
        round_by = 0.0
        if dtype == torch.uint8:
            round_by = FLOOR if self.floors else HALF_UP if self.half_up else 0.0
        mix, table = colour.tensors(self.inputs, self.colours, round_by)
        self.done.append(Pass(rows, columns, mix, table, row_index, column_index, dtype, box))
        self._begin(dtype)

    # along the axes

    def _then(self, axis: int, steps: list, inside: bool = False) -> None:
        """A step for all items, or one for each; None: nothing. inside: they are crops that do not
        reach beyond the image."""
        if steps == [None]:
            return
        self.touched = True
        variants = self.axes[axis]
        if len(variants) == len(steps) == 1:
            self.axes[axis] = [longer(variants[0], steps[0], inside, {})]
            return
        items = max(len(variants), len(steps))
        variants, steps = (x * items if len(x) == 1 else x for x in (variants, steps))
        shared = {}  # items with the same steps share them, and are told apart by their id
        self.axes[axis] = [
            each if step is None else longer(each, step, inside, shared)
            for each, step in zip(variants, steps, strict=True)
        ]

    def _blend(self, steps: dict[int, tuple], boxes=None) -> None:
        """Adds a step that mixes pixels to each axis in `steps`; boxes: the crop of each item
        before it. The pass ends first where values were clamped, where the product would read
        pixels that torch does not, and where boxes would need another product for each item."""
        gaps = self.sparse and any(self._gaps(*item) for item in steps.items())
        mixed = any(before not in ((), (FLIP,)) for axis in self.axes for _, _, before in axis)
        if self.clamped or gaps or (boxes is not None and mixed):
            self.finish(self.dtype)
        for axis, step in steps.items():
            if boxes is not None:
                crops = zip(boxes[axis], boxes[2 + axis], strict=True)
                self._then(axis, [("crop", *box, "constant") for box in crops], True)
            self._then(axis, [step])

    def _gaps(self, axis: int, step: tuple) -> bool:
        (_, length, steps), *more = self.axes[axis]
        if not steps and not more:
            return False
        before = bands_of(length, steps)
        return bool(more) or before.gaps(bands_of(before.out, (step,)))

    def _round(self) -> None:
        """torchvision rounds uint8 after the step that begins here."""
        if self.dtype == torch.uint8:
            self.roundings += 1
            if self.exact and self.rounds:
                self.finish(torch.uint8)
            self.rounds = self.touched = True

    def crop(self, top, left, height: int, width: int, fill=(0.0,), mode="constant") -> None:
        """top, left: lists, one number or one for each item. Beyond the image lies `fill` (one
        value, or one for each channel), or the image continued as mode says."""
        old, new = (self.height, self.width), (height, width)
        inside = [
            min(starts) >= 0 and max(starts) + length <= size
            for starts, length, size in zip((top, left), new, old, strict=True)
        ]
        fill = tuple(fill) * self.channels if len(fill) == 1 else tuple(fill)
        inner = not all(inside) and mode == "constant"
        inner = inner and fill != colour.product(self.inputs, self.colours)[1]
        if inner:  # the operator gives the bias there: let it be the fill
            if self.rounds and self.dtype == torch.uint8:
                self.finish(torch.uint8)
            self.scale((1.0,), tuple(-x for x in fill))
            self.finish(torch.float32 if self.dtype == torch.uint8 else self.dtype)
        for axis, starts in enumerate((top, left)):
            steps = [("crop", start, new[axis], mode) for start in starts]
            if not inside[axis]:
                for step in set(steps):
                    bands_of(old[axis], (step,))  # its error comes here
            self._then(axis, steps, inside[axis])
        self.height, self.width = height, width
        if inner:
            self.scale((1.0,), fill)

    def flip(self, axis: int, which: list[bool]) -> None:
        """axis: 0 flips upside down, 1 left to right. which: one for all items, or one for each."""
        self._then(axis, [FLIP if each else None for each in which])

    def resize(self, height, width, mode, antialias, *, boxes=None, native=True) -> None:
        """boxes: lists of top, left, height and width: what to resize of each item. native: False
        where torchvision resizes uint8 as float32, rounded once."""
        old, new = (self.height, self.width), (height, width)
        if boxes is None and old == new:
            return
        self._round()
        levels = self.dtype == torch.uint8
        native &= levels and (self.pil or resizes_uint8(mode))
        clamps = levels and mode == "bicubic"
        if clamps and native:
            self.roundings += 1  # counts twice: torchvision clamps between the axes
        dtype = torch.float64 if self.dtype == torch.float64 or native else torch.float32
        bits = (30 if self.pil else 15) if native and self.exact else 0
        how = mode, antialias, dtype, self.channels, bits
        steps = {axis: ("resize", new[axis], *how) for axis in range(2)}
        if bits:
            if boxes is not None or (old[0] != height and old[1] != width):
                first = 0 if self.pil and columns_first(*old, *new) else 1
                self._blend({first: steps.pop(first)}, boxes)
                if first == 0:
                    self.height = height
                else:
                    self.width = width
                self.half_up = True
                self.finish(torch.uint8)
            self.rounds = self.half_up = True
        self._blend(steps, boxes)
        self.height, self.width = new
        self.sparse |= not antialias and not levels
        if clamps:
            self.colours += (("clamp", 0.0, 255.0),)
            self.clamped = True

    def blur(self, kernel_size, sigma) -> None:
        """kernel_size, sigma: (width, height)."""
        self._round()
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        steps = zip(kernel_size[::-1], sigma[::-1], strict=True)
        steps = {axis: ("blur", *step, dtype) for axis, step in enumerate(steps)}
        for axis, size in enumerate((self.height, self.width)):
            bands_of(size, (steps[axis],))  # its error comes here
        self._blend(steps)

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
