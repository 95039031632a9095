"""The chain that the nets imitate, three ways: by torchvision (the ground truth), in plain torch as
two small matrix products, and by the fused operator of `common.fused`."""

from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from common.fused._layout import aside
from common.fused.operator import GRAY_WEIGHTS, SIZE, FusedTransform, fused_transform

__all__ = ["FusedTransform", "fused_transform", "matmul_transform", "reference_transform"]


def reference_transform(images: Tensor) -> Tensor:
    """Resize(28) -> Grayscale -> horizontal flip -> vertical flip, by torchvision v2: ground truth.

    images: (..., 3, H, W), uint8 in [0, 255] (first scaled to [0, 1]) or float.
    Returns (..., 1, 28, 28), float32 for uint8, else the dtype of images.
    """
    if images.dtype == torch.uint8:
        images = F.to_dtype(images, torch.float32, scale=True)
    images = F.resize(images, list(SIZE), antialias=True)
    images = F.rgb_to_grayscale(images, num_output_channels=1)
    return F.vertical_flip(F.horizontal_flip(images))


def _resize_matrix(
    in_size: int, out_size: int, flip: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(out_size, in_size): row i holds the weights of output pixel i, as torch's antialiased
    bilinear filter has them (aten/src/ATen/native/cpu/UpSampleKernel.cpp): a triangle of the
    width of one output pixel, cut at the border and normalised. Computed in `dtype`, like torch:
    rounding decides which pixels fall inside the filter support."""
    scale = torch.full((), in_size, dtype=dtype, device=device) / out_size
    support = scale.clamp(min=1)
    center = scale * (torch.arange(out_size, dtype=dtype, device=device)[:, None] + 0.5)
    taps = torch.arange(in_size, dtype=dtype, device=device)
    first, last = (center - support + 0.5).trunc(), (center + support + 0.5).trunc()
    distance = (taps - center + 0.5) / support
    weights = (1 - distance.abs()).clamp(min=0)
    weights = torch.where((taps >= first) & (taps < last), weights, 0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights.flip(0) if flip else weights


@lru_cache(maxsize=32)
def _kept_matrix(*arguments) -> Tensor:
    return aside(_resize_matrix, *arguments)  # no tensor of inference mode, vmap or autocast


def _matrix(*arguments) -> Tensor:
    """The cached matrix; under tracing a new one, with fake tensors and maybe symbolic sizes."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return _resize_matrix(*arguments)
    return _kept_matrix(*arguments)


def matmul_transform(
    images: Tensor, size: tuple[int, int] = SIZE, *, hflip: bool = True, vflip: bool = True
) -> Tensor:
    """The same chain as a weighted sum of the channels and two matrix products.

    images: (..., 3, H, W), uint8 in [0, 255] or float. Returns (..., 1, *size), float32 in [0, 1]
    for uint8, else the dtype of images; float16 and bfloat16 are accumulated in float32, under
    autocast too. All three steps are linear, so their order is free, and a flip is a reversed
    matrix. Unlike torchvision, a NaN or an infinity spreads over its whole row and column.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    red, green, blue = x.unbind(-3)
    gray = red * GRAY_WEIGHTS[0] + green * GRAY_WEIGHTS[1] + blue * GRAY_WEIGHTS[2]
    rows = _matrix(images.shape[-2], size[0], vflip, dtype, images.device)
    columns = _matrix(images.shape[-1], size[1], hflip, dtype, images.device)
    if images.is_meta or not torch.is_autocast_enabled(images.device.type):
        out = (rows @ gray @ columns.mT).unsqueeze(-3)
    else:  # which would multiply in bfloat16
        with torch.autocast(images.device.type, enabled=False):
            out = (rows @ gray @ columns.mT).unsqueeze(-3)
    return out / 255 if images.dtype == torch.uint8 else out.to(images.dtype)
