"""A step of a chain that can be fused."""

from collections.abc import Callable
from dataclasses import dataclass


class NotFusable(ValueError):
    """The chain has a step that the operator cannot do: the message names it, and why."""


@dataclass
class Step:
    """apply(passes, params): params is what `draw` gave for each item, or None to learn of the
    sizes only. draw(numbers, height, width): the random parameters of one item, see `draws`.
    sized: they depend on the image's size. flips: they are bools. fixed: always the same.
    arrays: it makes images of numpy arrays."""

    name: str
    apply: Callable
    draw: Callable | None = None
    sized: bool = False
    flips: bool = False
    fixed: bool = False
    arrays: bool = False
