"""The transforms of torchvision that resize, crop, flip and blur, as steps."""

import math
from collections.abc import Callable

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional._geometry import (
    _center_crop_compute_crop_anchor,
    _center_crop_compute_padding,
    _compute_resized_output_size,
)

from .passes import Passes
from .step import NotFusable, Step

MODES = {
    key: mode
    for mode, keys in (
        ("bilinear", ("bilinear", InterpolationMode.BILINEAR, 2)),
        ("bicubic", ("bicubic", InterpolationMode.BICUBIC, 3)),
    )
    for key in keys
}


def mode_of(interpolation) -> str:
    if interpolation not in MODES:
        raise NotFusable(f"interpolation {interpolation} must be bilinear or bicubic")
    return MODES[interpolation]


def resize(transform) -> Step:
    mode, antialias = mode_of(transform.interpolation), bool(transform.antialias)

    def apply(passes: Passes, _) -> None:
        old = passes.height, passes.width
        size = _compute_resized_output_size(old, transform.size, transform.max_size)
        resize_to(passes, size, mode, antialias)

    return Step("", apply)


def resize_to(passes: Passes, size, mode, antialias, **options) -> None:
    if min(size) < 1:
        raise ValueError(f"the size must be positive, not {tuple(size)}")
    passes.resize(*size, mode, antialias or passes.pil, **options)


def center_crop(transform) -> Step:
    return Step("", lambda passes, _: crop_center(passes, *transform.size))


def crop_center(passes: Passes, height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"the size must be positive, not {(height, width)}")
    old = passes.height, passes.width
    left, top, right, bottom = _center_crop_compute_padding(height, width, *old)
    padded = old[0] + top + bottom, old[1] + left + right
    start = _center_crop_compute_crop_anchor(height, width, *padded)
    passes.crop([start[0] - top], [start[1] - left], height, width)


def random_crop(transform) -> Step:
    height, width = transform.size
    mode = transform.padding_mode
    if min(height, width) < 1:
        raise ValueError(f"the size must be positive, not {(height, width)}")

    def apply(passes: Passes, params) -> None:
        left, top, *_ = params[0]["padding"] if params else (0, 0)
        fill = transform._fill.get("others") if mode == "constant" else None
        fill = [fill or 0.0] if isinstance(fill, (int, float, type(None))) else list(fill)
        if not all(map(math.isfinite, fill)):
            raise ValueError(f"its fill must be finite, not {fill}")
        if len(fill) not in (1, passes.channels):
            raise ValueError(f"{len(fill)} fill values do not fit {passes.channels} channels")
        if passes.dtype == torch.uint8:
            fill = [float(int(x)) for x in fill]
        tops, lefts = (
            [p[key] - pad for p in params or [{key: 0}]]
            for key, pad in (("top", top), ("left", left))
        )
        # without parameters only the size counts
        passes.crop(tops, lefts, height, width, fill, mode if params else "edge")

    if not set(transform._fill) <= {"others"}:
        raise NotFusable("its fill must be one for all kinds of images")
    return Step("", apply, _crop_maker(transform), sized=True)


def _crop_maker(transform) -> Callable:
    """transform.make_params of RandomCrop, as far as its numbers go."""

    def draw(numbers, height: int, width: int) -> dict:
        left, right, top, bottom = transform.padding or [0] * 4
        down, across = (
            size - out for size, out in zip((height, width), transform.size, strict=True)
        )
        down, across = down + top + bottom, across + left + right  # how far the crop can move
        if min(down, across) < 0:
            if not transform.pad_if_needed:
                transform.make_params([torch.empty(1, height, width, device="meta")])  # its error
            top, left = top + max(-down, 0), left + max(-across, 0)
        down, across = abs(down), abs(across)  # as much padding on both sides
        return {
            "top": numbers.below(down + 1) if down else 0,
            "left": numbers.below(across + 1) if across else 0,
            "padding": [left, top],
        }

    return draw


def random_resized_crop(transform) -> Step:
    mode, antialias = mode_of(transform.interpolation), bool(transform.antialias)

    def apply(passes: Passes, params) -> None:
        if params and len(params) == 1:
            box = params[0]
            passes.crop([box["top"]], [box["left"]], box["height"], box["width"])
            resize_to(passes, transform.size, mode, antialias)
            return
        whole = {"top": 0, "left": 0, "height": passes.height, "width": passes.width}
        boxes = [[p[key] for p in params or [whole]] for key in whole]
        resize_to(passes, transform.size, mode, antialias, boxes=boxes)

    return Step("", apply, _box_maker(transform), sized=True)


def _box_maker(transform) -> Callable:
    """transform.make_params of RandomResizedCrop: the same numbers in a tenth of its time, which is
    a third of what the whole chain takes."""
    low, high = transform.scale
    ratios = transform.ratio
    log_low, log_high = transform._log_ratio.tolist()

    def draw(numbers, height: int, width: int) -> dict[str, int]:
        for _ in range(10):
            target = height * width * numbers.uniform(low, high)
            ratio = numbers.exp_uniform(log_low, log_high)
            w = round(math.sqrt(target * ratio))
            h = round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = numbers.below(height - h + 1), numbers.below(width - w + 1)
                return {"top": top, "left": left, "height": h, "width": w}
        h, w = height, width  # the largest central box
        if width / height < min(ratios):
            h = round(width / min(ratios))
        elif width / height > max(ratios):
            w = round(height * max(ratios))
        return {"top": (height - h) // 2, "left": (width - w) // 2, "height": h, "width": w}

    return draw


def random_flip(axis: int) -> Callable:
    def make(transform) -> Step:
        def apply(passes: Passes, params) -> None:
            passes.flip(axis, params or [False, True])

        chance = torch.tensor(transform.p, dtype=torch.float32, device="cpu").item()

        def draw(numbers, _height: int, _width: int) -> bool:  # float32 compares it with p
            return numbers.uniform(0, 1) < chance

        return Step("", apply, draw, flips=True)

    return make


def flip(axis: int) -> Callable:
    return lambda _: Step("", lambda passes, _: passes.flip(axis, [True]))


def gaussian_blur(transform) -> Step:
    if transform.sigma[0] != transform.sigma[1]:
        raise NotFusable(f"its sigma must be one number, not the range {transform.sigma}")
    sigma = torch.tensor(transform.sigma[0]).item()  # torchvision draws it in float32

    def apply(passes: Passes, _) -> None:
        passes.blur(transform.kernel_size, (sigma, sigma))

    # drawn all the same, so that the steps after it draw what they draw in torchvision
    return Step("", apply, lambda numbers, *_: numbers.uniform(*transform.sigma), fixed=True)
