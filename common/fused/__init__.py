"""The fused operator, self-contained: `pip install .` installs it as `fused_transform`."""

from ._ops import load_if_built
from .bands import Bands, stack
from .fuse import NotFusable, fuse
from .operator import FusedTransform, affine, fused_transform, separable_map

load_if_built()

__all__ = [
    "Bands",
    "FusedTransform",
    "NotFusable",
    "affine",
    "fuse",
    "fused_transform",
    "separable_map",
    "stack",
]
