"""The transforms of torchvision that are linear, as steps: what each does to `Passes`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._geometry import (
    _center_crop_compute_crop_anchor,
    _center_crop_compute_padding,
    _compute_resized_output_size,
)

from ._ops import FLOATS
from .operator import GRAY_WEIGHTS, FusedTransform
from .passes import Passes

PIL_GRAY = tuple(w / 65536 for w in (19595, 38470, 7471))  # Pillow's convert("L")
MODES = {
    key: mode
    for mode, keys in (
        ("bilinear", ("bilinear", InterpolationMode.BILINEAR, 2)),
        ("bicubic", ("bicubic", InterpolationMode.BICUBIC, 3)),
    )
    for key in keys
}


class NotFusable(ValueError):
    """The chain has a step that the operator cannot do: the message names it, and why."""


@dataclass
class Step:
    """apply(passes, params): params is what `draw` gave for each item, or None to learn of the
    sizes only. draw(height, width): the random parameters of one item, from torch's generator.
    sized: they depend on the image's size. fixed: they are always the same."""

    name: str
    apply: Callable
    draw: Callable | None = None
    sized: bool = False
    fixed: bool = False
    probability: float | None = None  # of a flip: draw is torch.rand(1) < probability


def steps_of(chain) -> list[Step]:
    """The steps of a transform, or of a container of them. Raises NotFusable."""
    return [_step(i, transform) for i, transform in enumerate(_flat(chain))]


def _flat(chain) -> list:
    if isinstance(chain, (v2.Compose, v1.Compose)):
        chain = chain.transforms
    elif isinstance(chain, nn.Sequential):
        chain = list(chain)
    elif hasattr(chain, "fused_chain"):
        return _flat(chain.fused_chain)
    if isinstance(chain, (list, tuple)):
        return [transform for part in chain for transform in _flat(part)]
    return [chain]


def _step(i: int, transform) -> Step:
    name = getattr(transform, "__name__", None) or " ".join(repr(transform).split())
    name = f"step {i}, {name}"
    make = (
        FUNCTIONS.get(transform)
        if callable(transform) and not isinstance(transform, nn.Module)
        else TRANSFORMS.get(type(transform))
    )
    if make is None:
        known = ", ".join(sorted({kind.__name__ for kind in TRANSFORMS}))
        reason = REASONS.get(type(transform).__name__, "it is not one of the linear transforms")
        if type(transform).__module__.startswith("torchvision.transforms.transforms"):
            reason = "it is of torchvision's v1: use torchvision.transforms.v2"
        raise NotFusable(f"{name}: {reason} ({known}, hflip, vflip)")
    try:
        step = make(transform)
    except ValueError as error:
        raise NotFusable(f"{name}: {error}") from None
    step.name = name
    return step


REASONS = {
    **dict.fromkeys(("ColorJitter", "RandomAutocontrast"), "contrast and hue are not linear"),
    **dict.fromkeys(("RandomApply", "RandomChoice", "RandomOrder"), "it chooses between chains"),
    **dict.fromkeys(
        ("RandomRotation", "RandomAffine", "RandomPerspective", "ElasticTransform"),
        "it is not separable: rows and columns depend on each other",
    ),
    "Lambda": "nothing is known of its function",
}


def _identity(_transform) -> Step:
    return Step("", lambda passes, _: None)


def _to_image(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if passes.pil or passes.pure:
            passes.result, passes.pil, passes.pure = tv_tensors.Image, False, False

    return Step("", apply)


def _pil_to_tensor(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if passes.pil:
            passes.result, passes.pil, passes.pure = torch.Tensor, False, True

    return Step("", apply)


def _to_pure_tensor(_transform) -> Step:
    def apply(passes: Passes, _) -> None:
        if not passes.pil:
            passes.result, passes.pure = torch.Tensor, True

    return Step("", apply)


def _to_dtype(transform) -> Step:
    dtype, scale = transform.dtype, getattr(transform, "scale", True)
    if dtype not in (torch.uint8, *FLOATS):
        raise NotFusable("its dtype must be torch.uint8 (for uint8 images) or a float dtype")

    def apply(passes: Passes, _) -> None:
        if passes.pil or dtype == passes.dtype:
            return
        if dtype == torch.uint8:
            raise NotFusable(f"it cuts off the decimals of {passes.dtype} images")
        passes.cast(dtype, scale)

    return Step("", apply)


def _mode(interpolation) -> str:
    if interpolation not in MODES:
        raise NotFusable(f"interpolation {interpolation} must be bilinear or bicubic")
    return MODES[interpolation]


def _resize(transform) -> Step:
    mode, antialias = _mode(transform.interpolation), bool(transform.antialias)

    def apply(passes: Passes, _) -> None:
        old = passes.height, passes.width
        size = _compute_resized_output_size(old, transform.size, transform.max_size)
        _resize_to(passes, size, mode, antialias)

    return Step("", apply)


def _resize_to(passes: Passes, size, mode, antialias, **options) -> None:
    if min(size) < 1:
        raise ValueError(f"the size must be positive, not {tuple(size)}")
    passes.resize(*size, mode, antialias or passes.pil, **options)


def _center_crop(transform) -> Step:
    return Step("", lambda passes, _: _crop_center(passes, *transform.size))


def _crop_center(passes: Passes, height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"the size must be positive, not {(height, width)}")
    old = passes.height, passes.width
    left, top, right, bottom = _center_crop_compute_padding(height, width, *old)
    padded = old[0] + top + bottom, old[1] + left + right
    start = _center_crop_compute_crop_anchor(height, width, *padded)
    passes.crop(start[0] - top, start[1] - left, height, width)


def _random_crop(transform) -> Step:
    height, width = transform.size
    mode = transform.padding_mode
    if min(height, width) < 1:
        raise ValueError(f"the size must be positive, not {(height, width)}")

    def apply(passes: Passes, params) -> None:
        left, top, *_ = params[0]["padding"] if params else (0, 0)
        fill = transform._fill.get("others") if mode == "constant" else None
        fill = [fill or 0.0] if isinstance(fill, (int, float, type(None))) else list(fill)
        if passes.dtype == torch.uint8:
            fill = [float(int(x)) for x in fill]
        if len(fill) not in (1, passes.channels):
            raise ValueError(f"{len(fill)} fill values do not fit {passes.channels} channels")
        tops, lefts = (
            _of([p[key] - pad for p in params or [{key: 0}]])
            for key, pad in (("top", top), ("left", left))
        )
        passes.crop(tops, lefts, height, width, fill, mode)

    if not set(transform._fill) <= {"others"}:
        raise NotFusable("its fill must be one for all kinds of images")
    return Step("", apply, _maker(transform), sized=True)


def _random_resized_crop(transform) -> Step:
    mode, antialias = _mode(transform.interpolation), bool(transform.antialias)

    def apply(passes: Passes, params) -> None:
        if params and len(params) == 1:
            passes.crop(**params[0])
            _resize_to(passes, transform.size, mode, antialias)
            return
        whole = {"top": 0, "left": 0, "height": passes.height, "width": passes.width}
        boxes = torch.tensor([[p[key] for p in params or [whole]] for key in whole], device="cpu")
        _resize_to(passes, transform.size, mode, antialias, boxes=boxes)

    return Step("", apply, _box_maker(transform), sized=True)


def _box_maker(transform) -> Callable:
    """transform.make_params of RandomResizedCrop: the same numbers in a tenth of its time, which is
    a third of what the whole chain takes."""
    low, high = transform.scale
    ratios = transform.ratio
    log_low, log_high = transform._log_ratio.tolist()

    def draw(height: int, width: int) -> dict[str, int]:
        number, integer = torch.empty(1), torch.empty(1, dtype=torch.int64)
        for _ in range(10):
            target = height * width * number.uniform_(low, high).item()
            ratio = number.uniform_(log_low, log_high).exp_().item()
            w = round(math.sqrt(target * ratio))
            h = round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = integer.random_(0, height - h + 1).item()
                left = integer.random_(0, width - w + 1).item()
                return {"top": top, "left": left, "height": h, "width": w}
        h, w = height, width  # the largest central box
        if width / height < min(ratios):
            h = round(width / min(ratios))
        elif width / height > max(ratios):
            w = round(height * max(ratios))
        return {"top": (height - h) // 2, "left": (width - w) // 2, "height": h, "width": w}

    return draw


def _of(numbers: list[int]) -> int | torch.Tensor:
    """A number for one item, or one for each."""
    return numbers[0] if len(numbers) == 1 else torch.tensor(numbers, device="cpu")


def _maker(transform) -> Callable:
    """The transform's own draw, for an image of a size."""

    def draw(height: int, width: int):
        return transform.make_params([torch.empty(1, height, width, device="meta")])

    return draw


def _random_flip(axis: int) -> Callable:
    def make(transform) -> Step:
        def apply(passes: Passes, params) -> None:
            if params is None or len(params) != 1:
                passes.flip(axis, torch.tensor(params or [False, True], device="cpu"))
            elif params[0]:
                passes.flip(axis)

        def draw(_height: int, _width: int) -> bool:
            return not bool(torch.rand(1) >= transform.p)

        return Step("", apply, draw, probability=transform.p)

    return make


def _flip(axis: int) -> Callable:
    return lambda _: Step("", lambda passes, _: passes.flip(axis))


def _grayscale(transform) -> Step:
    copies = transform.num_output_channels
    if copies not in (1, 3):
        raise NotFusable(f"num_output_channels must be 1 or 3, not {copies}")
    return Step("", lambda passes, _: _gray(passes, copies))


def _gray(passes: Passes, copies: int) -> None:
    if passes.channels not in (1, 3):
        raise ValueError(f"an image of {passes.channels} channels has no gray: 1 or 3 are needed")
    if passes.channels == 1:
        passes.gray((1.0,), copies, floors=False)
    else:
        passes.gray(PIL_GRAY if passes.pil else GRAY_WEIGHTS, copies, floors=not passes.pil)


def _gaussian_blur(transform) -> Step:
    if transform.sigma[0] != transform.sigma[1]:
        raise NotFusable(f"its sigma must be one number, not the range {transform.sigma}")
    sigma = torch.tensor(transform.sigma[0]).item()  # torchvision draws it in float32

    def apply(passes: Passes, _) -> None:
        passes.blur(transform.kernel_size, (sigma, sigma))

    # drawn all the same, so that the steps after it draw what they draw in torchvision
    return Step("", apply, _maker(transform), fixed=True)


def _normalize(transform) -> Step:
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
    mean, std = (_rounded(tuple(values), passes.dtype) for values in (mean, std))
    n = max(len(mean), len(std))
    mean, std = (x * n if len(x) == 1 else x for x in (mean, std))
    passes.scale([1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)])


@lru_cache(maxsize=64)
def _rounded(values: tuple[float, ...], dtype: torch.dtype) -> list[float]:
    """torchvision rounds mean and std to the dtype of the images."""
    return torch.tensor(values, dtype=dtype, device="cpu").tolist()


def _fused_transform(transform) -> Step:
    flips = transform.vflip, transform.hflip
    if not all(isinstance(flip, bool) for flip in flips):
        raise NotFusable("its flips must be True or False, not a mask")

    def apply(passes: Passes, _) -> None:
        if passes.pil or passes.channels != 3:
            raise TypeError("it takes tensors of three channels")
        passes.cast(torch.float32 if passes.dtype == torch.uint8 else passes.dtype, True)
        _resize_to(passes, transform.size, "bilinear", True)
        _gray(passes, 1)
        for axis, flip in enumerate(flips):
            if flip:
                passes.flip(axis)

    return Step("", apply)


def _preset(transform) -> Step:
    mode = _mode(transform.interpolation)

    def apply(passes: Passes, _) -> None:
        old = passes.height, passes.width
        size = _compute_resized_output_size(old, transform.resize_size)
        # torchvision's v1 resizes uint8 tensors as float32
        _resize_to(passes, size, mode, bool(transform.antialias), native=passes.pil)
        crop = transform.crop_size
        _crop_center(passes, crop[0], crop[-1])
        passes.pil, passes.pure, passes.result = False, True, torch.Tensor
        passes.cast(torch.float32, True)
        _normalize_by(passes, transform.mean, transform.std)

    return Step("", apply)


TRANSFORMS = {
    v2.Identity: _identity,
    nn.Identity: _identity,
    v2.ToImage: _to_image,
    v2.PILToTensor: _pil_to_tensor,
    v2.ToPureTensor: _to_pure_tensor,
    v2.ToDtype: _to_dtype,
    v2.ConvertImageDtype: _to_dtype,
    v2.Resize: _resize,
    v2.CenterCrop: _center_crop,
    v2.RandomCrop: _random_crop,
    v2.RandomResizedCrop: _random_resized_crop,
    v2.RandomHorizontalFlip: _random_flip(1),
    v2.RandomVerticalFlip: _random_flip(0),
    v2.Grayscale: _grayscale,
    v2.GaussianBlur: _gaussian_blur,
    v2.Normalize: _normalize,
    FusedTransform: _fused_transform,
    ImageClassification: _preset,
}
FUNCTIONS = {F.horizontal_flip: _flip(1), F.vertical_flip: _flip(0)}
