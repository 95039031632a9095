"""The images of a sample: which parts they are, what they are, and a pass over them."""

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ._ops import FLOATS
from .operator import apply_plan
from .passes import Pass


def images_of(flat: list) -> list[int]:
    """Which parts of a sample v2 transforms take for images."""
    refused = tv_tensors.BoundingBoxes, tv_tensors.KeyPoints, tv_tensors.Mask
    for x in flat:
        if isinstance(x, refused):
            raise TypeError(f"fuse: a sample with {type(x).__name__} cannot be fused: images only")
    chosen = [
        i
        for i, x in enumerate(flat)
        if isinstance(x, (tv_tensors.Image, tv_tensors.Video, PIL.Image.Image))
    ]
    if not chosen:
        chosen = [i for i, x in enumerate(flat) if isinstance(x, Tensor)][:1]
    if not chosen:
        raise TypeError("fuse: there is no image in the sample")
    return chosen


def with_arrays(leaves: list) -> list:
    """The same with an Image, not copied, for each (H, W, C) or (H, W) array, as ToImage does."""
    arrays = [isinstance(x, np.ndarray) for x in leaves]
    if any(arrays) and any(type(x) is Tensor and x.dim() > 1 for x in leaves):
        raise TypeError(
            "fuse: beside arrays, ToImage also makes an image of the first plain tensor: make the "
            "images tv_tensors.Image"
        )
    return [
        tv_tensors.Image(torch.from_numpy(np.atleast_3d(x)).permute(2, 0, 1)) if array else x
        for x, array in zip(leaves, arrays, strict=True)
    ]


def spec_of(image) -> tuple[type, torch.dtype, tuple[int, ...]]:
    """What a recipe depends on: tv_tensors.Image or Video, a plain Tensor or a PIL image; dtype,
    (C, H, W)."""
    if isinstance(image, Tensor):
        kind = type(image) if isinstance(image, tv_tensors.TVTensor) else Tensor
        return kind, image.dtype, image.shape[-3:]
    if image.mode not in ("RGB", "L"):
        raise TypeError(f"fuse: PIL images must be of mode RGB or L, not {image.mode}")
    shape = len(image.getbands()), image.height, image.width
    return PIL.Image.Image, torch.uint8, shape


def check(spec: tuple) -> None:
    _, dtype, shape = spec
    if dtype not in (torch.uint8, *FLOATS):
        raise TypeError(f"fuse: images must be uint8 or float, not {dtype}")
    if len(shape) < 3 or min(shape) < 1:
        raise ValueError(f"fuse: images must be (..., C, H, W), none of them 0: {tuple(shape)}")


def items_of(image) -> int:
    if not isinstance(image, Tensor):
        return 1
    own = 4 if isinstance(image, tv_tensors.Video) else 3
    return image.shape[0] if image.dim() > own else 1


def apply(each: Pass, x: Tensor, items: int) -> Tensor:
    if each.box is not None:
        top, left, height, width = each.box
        x = x[..., top : top + height, left : left + width]
    indices = each.row_index, each.column_index
    if indices == (None, None):
        return apply_plan(x, each.plan(x), each.mix, each.table, *indices, each.dtype, None)
    flat = x if x.dim() == 4 else x.flatten(0, -4)
    repeats = len(flat) // max(items, 1)
    if repeats != 1:
        indices = [None if i is None else i[:items].repeat_interleave(repeats) for i in indices]
    indices = [None if i is None else i.to(x.device) for i in indices]
    out = apply_plan(flat, each.plan(x), each.mix, each.table, *indices, each.dtype, None)
    return out if x.dim() == 4 else out.unflatten(0, x.shape[:-3])


def wrap(x: Tensor, image, result: type | None, pil: bool):
    """x as the chain gives it for this image: a PIL image, `result`, or if None of the type of the
    image."""
    if pil:
        return F.to_pil_image(x)
    if result is None:
        return tv_tensors.wrap(x, like=image) if isinstance(image, tv_tensors.TVTensor) else x
    return x if result is Tensor else x.as_subclass(result)


def show(each: Pass) -> str:
    def axis(bands) -> str:
        return f"{bands.size}->{bands.out} ({bands.weight.shape[2]} taps)"

    dtype = str(each.dtype).removeprefix("torch.")
    return f"{axis(each.rows)} x {axis(each.columns)}, {len(each.mix)} channels {dtype}"
