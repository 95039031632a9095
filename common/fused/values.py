"""The transforms of torchvision that change types, dtypes and channels, as steps."""

from functools import lru_cache

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2.functional._geometry import _compute_resized_output_size

from ._ops import FLOATS
from .geometry import crop_center, mode_of, resize_to
from .operator import GRAY_WEIGHTS
from .passes import Passes
from .step import NotFusable, Step

PIL_GRAY = tuple(w / 65536 for w in (19595, 38470, 7471))  # Pillow's convert("L")


def identity(_transform) -> Step:
    return Step("", lambda passes, _: None)


def to_image(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if passes.pil or passes.pure:
            passes.result, passes.pil, passes.pure = tv_tensors.Image, False, False

    return Step("", apply, arrays=True)


def pil_to_tensor(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if passes.pil:
            passes.result, passes.pil, passes.pure = torch.Tensor, False, True

    return Step("", apply)


def to_pure_tensor(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if not passes.pil:
            passes.result, passes.pure = torch.Tensor, True

    return Step("", apply)


def to_dtype(transform) -> Step:
    dtype, scale = transform.dtype, getattr(transform, "scale", True)
    if dtype not in (torch.uint8, *FLOATS):
        raise NotFusable("its dtype must be torch.uint8 (for uint8 images) or a float dtype")

    def apply(passes: Passes, _) -> None:
        if passes.pil or dtype == passes.dtype:
            return
        if dtype == torch.uint8:
            raise NotFusable(f"it truncates {passes.dtype} values, which is not linear")
        passes.cast(dtype, scale)

    return Step("", apply)


def grayscale(transform) -> Step:
    copies = transform.num_output_channels
    if copies not in (1, 3):
        raise NotFusable(f"num_output_channels must be 1 or 3, not {copies}")

    def apply(passes: Passes, _) -> None:
        if passes.kind is tv_tensors.Video and not passes.pure:
            raise TypeError("torchvision leaves a Video as it is: put ToPureTensor before it")
        _gray(passes, copies)

    return Step("", apply)


def _gray(passes: Passes, copies: int) -> None:
    if passes.channels not in (1, 3):
        raise ValueError(f"an image of {passes.channels} channels has no gray: 1 or 3 are needed")
    if passes.channels == 1:
        passes.gray((1.0,), copies, floors=False)
    else:
        passes.gray(PIL_GRAY if passes.pil else GRAY_WEIGHTS, copies, floors=not passes.pil)


def normalize(transform) -> Step:
    mean, std = list(transform.mean), list(transform.std)
    if not all(std):
        raise ValueError("std holds a zero, which leads to a division by zero")
    return Step("", lambda passes, _: _normalize_by(passes, mean, std))


def _normalize_by(passes: Passes, mean, std) -> None:
    if passes.pil or not passes.dtype.is_floating_point:
        what = "PIL images" if passes.pil else f"{passes.dtype} images"
        raise TypeError(f"no {what}: put ToImage and ToDtype(torch.float32, scale=True) before it")
    for values, name in ((mean, "mean"), (std, "std")):
        if len(values) not in (1, passes.channels):
            raise ValueError(f"{name} of length {len(values)}, but {passes.channels} channels")
    passes.scale(*_factors(tuple(mean), tuple(std), passes.dtype))


@lru_cache(maxsize=64)
def _factors(mean, std, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """1 / std and -mean / std; torchvision rounds mean and std to the dtype of the images."""
    mean, std = (torch.tensor(x, dtype=dtype, device="cpu").tolist() for x in (mean, std))
    if not all(std):
        raise ValueError(f"std is zero in {dtype}, which leads to a division by zero")
    n = max(len(mean), len(std))
    mean, std = (x * n if len(x) == 1 else x for x in (mean, std))
    shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return tuple(1 / s for s in std), shift


def fused_transform(transform) -> Step:
    flips = transform.vflip, transform.hflip
    if not all(isinstance(flip, bool) for flip in flips):
        raise NotFusable("its flips must be True or False, not a mask")

    def apply(passes: Passes, _) -> None:
        if passes.pil or passes.channels != 3:
            raise TypeError("it takes tensors of three channels")
        passes.cast(torch.float32 if passes.dtype == torch.uint8 else passes.dtype, True)
        resize_to(passes, transform.size, "bilinear", True)
        _gray(passes, 1)
        for axis, flip in enumerate(flips):
            if flip:
                passes.flip(axis, [True])

    return Step("", apply)


def preset(transform) -> Step:
    mode = mode_of(transform.interpolation)

    def apply(passes: Passes, _) -> None:
        old = passes.height, passes.width
        size = _compute_resized_output_size(old, transform.resize_size)
        # torchvision's v1 resizes uint8 tensors as float32
        resize_to(passes, size, mode, bool(transform.antialias), native=passes.pil)
        crop = transform.crop_size
        crop_center(passes, crop[0], crop[-1])
        passes.pil, passes.pure, passes.result = False, True, torch.Tensor
        passes.cast(torch.float32, True)
        _normalize_by(passes, transform.mean, transform.std)

    return Step("", apply)
