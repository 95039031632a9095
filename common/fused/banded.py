"""Banded matrices: what a linear step does along one axis.

Every step of a linear chain is `out = matrix @ pixels` along each axis, and each row of the matrix
reads a few neighbouring pixels. `bands` makes them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CPU = torch.device("cpu")  # named, as torch.set_default_device may say otherwise


@dataclass(frozen=True, eq=False)
class Bands:
    """V banded matrices of shape (out, size), on the CPU: row o of matrix v has the weights
    weight[v, o, :count[v, o]] from input pixel first[v, o] on, and zeros elsewhere.

    first, count: (V, out), int64. weight: (V, out, taps), float64, zero beyond count. A weight
    inside of a window may be zero: the pixel is still read, and a NaN in it spreads, as in torch.
    A row whose count is 0 reads nothing and gives 0.
    """

    first: Tensor
    count: Tensor
    weight: Tensor
    size: int

    @property
    def out(self) -> int:
        return self.first.shape[1]

    def __len__(self) -> int:
        return self.first.shape[0]

    def __repr__(self) -> str:
        taps = self.weight.shape[2]
        return f"Bands({self.size} -> {self.out} pixels, taps={taps}, variants={len(self)})"

    def flipped(self) -> "Bands":
        """The same, then a flip of the result."""
        return self._flipped

    @cached_property
    def _flipped(self) -> "Bands":
        return Bands(self.first.flip(1), self.count.flip(1), self.weight.flip(1), self.size)

    def cut(self, start: int, length: int) -> "Bands":
        """The same, then a crop inside of the result."""
        parts = (x[:, start : start + length] for x in (self.first, self.count, self.weight))
        return Bands(*parts, self.size)

    def then(self, other: "Bands") -> "Bands":
        """The product: first these bands, then the other ones, which read what these give. A
        window of the product runs from the first to the last pixel that it reads (see `gaps`)."""
        first, low, high, _, place = _windows(self, other)
        taps = max(int((high - low).max()), 1) if high.numel() else 1
        weight = other.weight[..., None] * _gather(self.weight, first)
        target = weight.new_zeros(*low.shape, taps)
        target.scatter_add_(2, place.flatten(2).clamp_(0, taps - 1), weight.flatten(2))
        return Bands(low, high - low, target, self.size)

    def gaps(self, other: "Bands") -> bool:
        """True where a window of `self.then(other)` covers a pixel that the two steps do not read:
        a NaN in it would spread further than in torch."""
        _, low, high, read, place = _windows(self, other)
        taps = max(int((high - low).max()), 1) if high.numel() else 1
        covered = torch.zeros(*low.shape, taps, dtype=torch.bool, device=CPU)
        covered = covered.scatter_reduce(
            2, place.flatten(2).clamp(0, taps - 1), read.flatten(2), reduce="amax"
        )
        return bool((covered.sum(2) < high - low).any())

    def transposed(self) -> "Bands":
        """The transposed matrices, (size, out): what the gradient needs. A window runs from the
        first to the last output that reads a pixel."""
        taps = torch.arange(self.weight.shape[2], device=CPU)
        read = taps < self.count[..., None]  # (V, out, taps)
        pixel = (self.first[..., None] + taps).where(read, self.size).flatten(1)
        output = torch.arange(self.out, device=CPU)[:, None].expand_as(read).flatten(1)
        shape = (len(self), self.size + 1)  # the last column takes what is not read
        last = torch.full(shape, -1, device=CPU).scatter_reduce(1, pixel, output, "amax")
        first = torch.full(shape, self.out, device=CPU).scatter_reduce(1, pixel, output, "amin")
        first, last = first[:, :-1], last[:, :-1]
        count = (last - first + 1).clamp(min=0)
        first = first.where(count > 0, 0)
        reach = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=CPU)
        place = (output - first.gather(1, pixel.clamp(max=self.size - 1))).clamp(0, len(reach) - 1)
        flat = (pixel * len(reach) + place).where(pixel < self.size, self.size * len(reach))
        weight = self.weight.new_zeros(len(self), self.size * len(reach) + 1)
        weight.scatter_(1, flat, self.weight.flatten(1))
        weight = weight[:, :-1].view(len(self), self.size, len(reach))
        return Bands(first, count, weight, self.out)

    def matrix(self) -> Tensor:
        """The dense matrices, (V, out, size), float64."""
        taps = torch.arange(self.weight.shape[2], device=CPU)
        pixel = (self.first[..., None] + taps).where(taps < self.count[..., None], self.size)
        dense = self.weight.new_zeros(*self.first.shape, self.size + 1)
        return dense.scatter_add(2, pixel, self.weight)[..., : self.size]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values (V, out, ...) at rows index (V', ...): each variant its own; V or V' may be 1."""
    if len(values) == 1:
        return values[0][index]
    variant = torch.arange(len(values), device=CPU).view(-1, *[1] * (index.dim() - 1))
    return values[variant, index]


def _windows(bands: Bands, other: Bands) -> tuple[Tensor, ...]:
    """Of the product: the rows of `bands` that each tap of `other` reads (V, out, taps), the
    product's windows [low, high) (V, out), which taps of both are read and where the pixel of each
    lies in its window (both (V, out, taps of other, taps of bands))."""
    if other.size != bands.out:
        raise ValueError(f"bands of {other.size} pixels cannot follow bands of {bands.out}")
    taps = torch.arange(other.weight.shape[2], device=CPU)
    row = (other.first[..., None] + taps).clamp(max=max(bands.out - 1, 0))
    count = _gather(bands.count, row).where(taps < other.count[..., None], 0)
    first = _gather(bands.first, row)
    low = first.where(count > 0, bands.size).amin(2)
    high = (first + count).where(count > 0, 0).amax(2)
    low = low.minimum(high)  # a row that reads nothing
    inner = torch.arange(bands.weight.shape[2], device=CPU)
    return row, low, high, inner < count[..., None], first[..., None] + inner - low[..., None, None]


def stack(bands: list[Bands]) -> Bands:
    """One Bands with the variants of all, in order. All must have the same `size`, which is not
    checked, and the same `out`. Raises RuntimeError for another `out`."""
    taps = max(b.weight.shape[2] for b in bands)
    weight = [torch.nn.functional.pad(b.weight, (0, taps - b.weight.shape[2])) for b in bands]
    first = torch.cat([b.first for b in bands])
    return Bands(first, torch.cat([b.count for b in bands]), torch.cat(weight), bands[0].size)
