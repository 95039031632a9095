"""What the operator refuses before a kernel sees it, and why there is no kernel for some images."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _build


def mask(name: str, flip, images: Tensor) -> Tensor:
    if not isinstance(flip, Tensor) or flip.dtype != torch.bool:
        what = flip.dtype if isinstance(flip, Tensor) else repr(flip)
        raise TypeError(f"fused_transform: {name} must be a bool or a bool tensor, not {what}")
    if images.dim() != 4 or flip.shape != images.shape[:1]:
        raise ValueError(
            f"fused_transform: {name} of shape {tuple(flip.shape)} must hold one flag for each "
            f"image of an (N, 3, H, W) batch, which is {tuple(images.shape)}"
        )
    if flip.device != images.device:
        raise ValueError(f"fused_transform: {name} must be on the device of the images")
    return flip


def fault(images, size) -> Exception:
    """What is wrong with these two."""
    if not isinstance(images, Tensor):
        return TypeError("fused_transform: images and out must be tensors")
    try:
        _, _ = size
    except (TypeError, ValueError):
        return TypeError(f"fused_transform: size must be (height, width), not {size!r}")
    return no_kernel(images) or ValueError(
        f"fused_transform: images must be (..., 3, H, W), not {tuple(images.shape)}"
    )


def no_kernel(images: Tensor) -> RuntimeError | None:
    """Why there is no kernel for images of this kind."""
    for kind, found in (("nested", images.is_nested), ("quantized", images.is_quantized)):
        if found:
            return RuntimeError(f"fused_transform: no kernel for {kind} images")
    if images.layout != torch.strided:
        return RuntimeError(f"fused_transform: no kernel for {images.layout} images")
    if images.device.type != "cpu":
        more = f". Build it: FORCE_CUDA=1 {_build.COMMAND}" if images.is_cuda else ""
        return RuntimeError(f"fused_transform: no kernel for images on {images.device}{more}")
    return None


def check_out(images: Tensor, out: Tensor) -> None:
    if (
        (torch.is_grad_enabled() and (images.requires_grad or out.requires_grad))
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        raise RuntimeError("fused_transform: out= records no gradient; use torch.no_grad()")


def check_constants(*constants) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in constants
    ):
        raise RuntimeError("separable_map: mix, bias, low and high get no gradient: detach them")
