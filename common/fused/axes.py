"""What a chain does along one axis of an image: its steps by name, and the bands that they make."""

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from . import bands as b
from .banded import Bands, stack

# a step: ("resize", out, mode, antialias, dtype, channels, bits), where bits are those to which
# weights are `quantized`, or 0; ("crop", start, length, mode); ("blur", kernel_size, sigma, dtype)
Steps = tuple[tuple, ...]
FLIP = ("flip",)
Variant = tuple[int, int, Steps]  # steps on `length` pixels of an image, from `start` on


class Axis(Bands):
    """The bands of these variants, computed on first use. Kernels need only the packed form, which
    `_layout` makes and keeps for each length: random crops have only a few hundred lengths."""

    def __init__(self, size: int, out: int, variants: list[Variant]) -> None:
        vars(self).update(size=size, _out=out, variants=variants)

    @cached_property
    def _made(self) -> Bands:
        made = []
        for start, length, steps in self.variants:
            bands = bands_of(length, steps)
            made.append(Bands(bands.first + start, bands.count, bands.weight, self.size))
        return stack(made)

    first = property(lambda self: self._made.first)
    count = property(lambda self: self._made.count)
    weight = property(lambda self: self._made.weight)
    out = property(lambda self: self._out)

    def __len__(self) -> int:
        return len(self.variants)


def longer(variant: Variant, step: tuple, inside: bool, shared: dict) -> Variant:
    """The variant with one more step. inside: a crop that does not reach beyond the image. shared:
    a dict through which variants with equal steps share one tuple, as `distinct` compares ids."""
    start, length, steps = variant
    if inside and not steps:
        return start + step[1], step[2], steps
    if inside and steps == (FLIP,):
        return start + length - step[1] - step[2], step[2], steps
    more = shared.get((id(steps), step))
    if more is None:
        more = steps[:-1] if steps and step == FLIP == steps[-1] else (*steps, step)
        shared[id(steps), step] = more
    return start, length, more


def distinct(variants: list[Variant], size: int, out: int) -> tuple[Axis, Tensor | None]:
    """The axis of the variants that differ, and which one each item takes."""
    if len(variants) == 1:
        return Axis(size, out, variants), None
    places = {}
    keys = [(start, length, id(steps)) for start, length, steps in variants]
    index = [places.setdefault(key, len(places)) for key in keys]
    if len(places) == 1:
        return Axis(size, out, variants[:1]), None
    if len(places) == len(variants):
        return Axis(size, out, variants), torch.arange(len(variants), device=b.CPU)
    chosen = dict(zip(index, variants, strict=True))
    return Axis(size, out, list(chosen.values())), torch.tensor(index, device=b.CPU)


@lru_cache(maxsize=256)
def bands_of(length: int, steps: Steps) -> Bands:
    """The product of the steps on an image of this length."""
    return each_bands_of([length], steps)


def each_bands_of(lengths: list[int], steps: Steps) -> Bands:
    """The same, a variant for each of the lengths; more than one where the first step resizes."""
    if not steps:
        return b.identity(*lengths)
    *before, (kind, *options) = steps
    if kind == "resize" and not before:
        return _resized(lengths, *options)
    before = tuple(before)
    bands = bands_of(*lengths, before) if len(lengths) == 1 else each_bands_of(lengths, before)
    if kind == "flip":
        return bands.flipped()
    if kind == "crop":
        start, out, _ = options
        if start >= 0 and start + out <= bands.out:
            return bands.cut(start, out)
    if before:
        return bands.then(bands_of(bands.out, (steps[-1],)))
    return (b.crop if kind == "crop" else b.blur)(bands.out, *options)


def _resized(lengths: list[int], out, mode, antialias, dtype, channels, bits) -> Bands:
    bands = b.resize_each(lengths, out, mode, antialias, dtype, channels)
    return b.quantized(bands, bits) if bits else bands
