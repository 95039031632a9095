"""What a chain does across the channels of an image: each step of it, and their product as the
tensors that the operator takes."""

from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from ._layout import aside
from .bands import CPU

# a step: ("scale", factors, shifts), ("gray", weights, copies) or ("clamp", low, high)
Channels = tuple[float, ...]  # a number for each


@lru_cache(maxsize=256)
def product(channels: int, steps: tuple) -> tuple[tuple[Channels, ...], Channels, tuple | None]:
    """mix (a tuple for each channel of the result), bias, and (low, high) of each channel or None,
    of these steps on an image of so many channels."""
    if not steps:
        n = range(channels)
        return tuple(tuple(float(i == j) for j in n) for i in n), (0.0,) * channels, None
    *before, (kind, a, b) = steps
    mix, bias, clamp = product(channels, tuple(before))
    n = len(mix)
    if kind == "clamp":
        return mix, bias, ((a, b),) * n
    if kind == "gray":  # b channels, each the sum of all by the weights a
        columns = zip(*mix, strict=True)
        gray = tuple(sum(w * x for w, x in zip(a, column, strict=True)) for column in columns)
        level = sum(w * x for w, x in zip(a, bias, strict=True))
        return (gray,) * b, (level,) * b, clamp and clamp * b
    factor, shift = (x * n if len(x) == 1 else x for x in (a, b))
    mix = tuple(tuple(f * x for x in row) for f, row in zip(factor, mix, strict=True))
    bias = tuple(f * x + s for f, x, s in zip(factor, bias, shift, strict=True))
    if clamp:
        ends = zip(factor, shift, clamp, strict=True)
        clamp = tuple(tuple(sorted((f * low + s, f * high + s))) for f, s, (low, high) in ends)
    return mix, bias, clamp


@lru_cache(maxsize=256)
def tensors(channels: int, steps: tuple, round_by: float) -> tuple[Tensor, Tensor | None]:
    """The same as `separable_map` takes them: mix and bias, with round_by added to the result."""
    return aside(_tensors, *product(channels, steps), round_by)


def _tensors(mix, bias, clamp, round_by) -> tuple[Tensor, Tensor | None]:
    bias = [x + round_by for x in bias]
    tensor = torch.tensor(mix, dtype=torch.float64, device=CPU)
    if clamp is None and not any(bias):
        return tensor, None
    low, high = zip(*clamp, strict=True) if clamp else (None, None)
    return tensor, affine(len(mix), bias, low, high)


def affine(channels: int, bias=None, low=None, high=None) -> Tensor:
    """(channels, 3) float64: bias, low and high of each channel of the result, as the bias of
    `separable_map`. Each argument is None, a number, or one for each channel; a bias that is such a
    table is returned as it is. Raises RuntimeError for another number of channels."""
    if isinstance(bias, Tensor) and bias.dim() == 2 and low is None and high is None:
        return bias
    table = torch.tensor([[0.0, -torch.inf, torch.inf]], dtype=torch.float64).repeat(channels, 1)
    for column, value in enumerate((bias, low, high)):
        if value is not None:
            table[:, column] = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    return table


def unclamped(affine: Tensor) -> tuple[Tensor, Tensor | None]:
    """The table without what clamps; and the lowest and the highest values of each channel."""
    if not bool(affine[:, 1:].isfinite().any()):
        return affine, None
    free = affine.new_tensor([[-inf, inf]]).expand(len(affine), 2)
    return torch.cat([affine[:, :1], free], 1), affine[:, 1:].T[..., None, None]
