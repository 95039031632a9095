"""Banded matrices: the linear maps of one axis."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bands:
    """V banded matrices (out, in) on the CPU: row o of variant v holds weight[v, o, :count[v, o]]
    from column first[v, o] on.

    first, count: (V, out) int64. weight: (V, out, taps) float64, zero beyond count. size: in.
    """

    first: Tensor
    count: Tensor
    weight: Tensor
    size: int

    def matrix(self) -> Tensor:
        """(V, out, in) float64."""
        variants, out, taps = self.weight.shape
        dense = torch.zeros(variants, out, self.size + taps, dtype=torch.float64)
        dense.scatter_(2, self.first[..., None] + torch.arange(taps), self.weight)
        return dense[..., : self.size]

    def flipped(self) -> "Bands":
        """The rows in reverse order: the output is flipped."""
        return Bands(self.first.flip(1), self.count.flip(1), self.weight.flip(1), self.size)

    def transposed(self) -> "Bands":
        variants, out, taps = self.weight.shape
        tap = torch.arange(taps)
        live = tap < self.count[..., None]
        v, o, t = live.nonzero(as_tuple=True)
        column = self.first[v, o] + t
        first = torch.full((variants, self.size), out, dtype=torch.int64)
        last = torch.full((variants, self.size), -1, dtype=torch.int64)
        place = v * self.size + column
        first.view(-1).scatter_reduce_(0, place, o, "amin")
        last.view(-1).scatter_reduce_(0, place, o, "amax")
        count = (last - first + 1).clamp(min=0)
        first = first.where(count > 0, 0)
        weight = torch.zeros(variants, self.size, max(1, int(count.max())), dtype=torch.float64)
        weight[v, column, o - first[v, column]] = self.weight[v, o, t]
        return Bands(first, count, weight, out)


def stack(bands: list[Bands]) -> Bands:
    """One Bands with the variants of all, whose shapes must agree."""
    taps = max(b.weight.shape[2] for b in bands)
    weights = [torch.nn.functional.pad(b.weight, (0, taps - b.weight.shape[2])) for b in bands]
    return Bands(
        torch.cat([b.first for b in bands]),
        torch.cat([b.count for b in bands]),
        torch.cat(weights),
        bands[0].size,
    )


def resize(size: int, out: int, dtype: torch.dtype = torch.float32) -> Bands:
    """torch's antialiased bilinear filter (aten/src/ATen/native/cpu/UpSampleKernel.cpp): a triangle
    of the width of one output pixel, cut at the border and normalised. Computed in `dtype`, as torch
    does, since a rounding can decide whether a pixel lies under the filter."""
    if size == out:
        first = torch.arange(out)[None]
        one = torch.ones(1, out, 1, dtype=torch.float64)
        return Bands(first, torch.ones_like(first), one, size)
    # torch mixes types: a sum with 0.5 is a double, what is stored in a variable is of `dtype`
    scale = torch.tensor(size, dtype=dtype) / torch.tensor(out, dtype=dtype)
    support = scale.clamp(min=1.0)
    center = (scale.double() * (torch.arange(out).double() + 0.5)).to(dtype)
    first = ((center - support).double() + 0.5).to(torch.int64).clamp(min=0)
    last = ((center + support).double() + 0.5).to(torch.int64).clamp(max=size)
    count = (last - first).clamp(min=0, max=2 * int(support.ceil()) + 1)
    tap = torch.arange(int(count.max()))
    distance = (first[:, None] + tap).to(dtype) - center[:, None]
    x = ((distance.double() + 0.5) * (1 / support).double()).to(dtype).abs()
    weight = torch.where((tap < count[:, None]) & (x < 1), 1 - x, 0)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return Bands(first[None], count[None], weight.double()[None], size)
