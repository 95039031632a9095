"""The chain that the nets imitate, three ways: torchvision's own (the ground truth), its plain
torch twin as two small matrix products, and the fused operator. Imports nothing of `common`, but
for the operator's library, which `common._build` finds or builds when it is first used."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

SIZE = (28, 28)
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)


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


@lru_cache(maxsize=32)
def _resize_matrix(
    in_size: int, out_size: int, flip: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(out_size, in_size): row i holds the weights of output pixel i, as torch's antialiased
    bilinear filter has them (aten/src/ATen/native/cpu/UpSampleKernel.cpp): a triangle of the
    width of one output pixel, cut at the border and normalised. Reckoned in `dtype`, as torch
    does, since a rounding can decide whether a pixel lies under the filter."""
    scale = torch.tensor(in_size / out_size, dtype=dtype)
    support = scale.clamp(min=1.0)
    center = scale * (torch.arange(out_size, dtype=dtype) + 0.5)
    first = (center - support + 0.5).to(torch.int64).clamp(min=0)
    last = (center + support + 0.5).to(torch.int64).clamp(max=in_size)
    taps = torch.arange(in_size)
    under = (taps >= first[:, None]) & (taps < last[:, None])
    distance = (taps - center[:, None] + 0.5) / support
    weights = torch.where(under, (1 - distance.abs()).clamp(min=0), 0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights.flip(0) if flip else weights).to(device)


def matmul_transform(
    images: Tensor, size: tuple[int, int] = SIZE, *, hflip: bool = True, vflip: bool = True
) -> Tensor:
    """The same chain as a weighted sum of the channels and two matrix products.

    images: (..., 3, H, W), uint8 in [0, 255] or float. Returns (..., 1, *size), float32 in [0, 1]
    for uint8, else the dtype of images; float16 and bfloat16 are reckoned in float32. All three
    steps are linear, so their order is free, and a flip is a reversed matrix. Unlike
    torchvision, a NaN or an infinity spreads over its whole row and column.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    red, green, blue = x.unbind(-3)
    gray = red * GRAY_WEIGHTS[0] + green * GRAY_WEIGHTS[1] + blue * GRAY_WEIGHTS[2]
    rows = _resize_matrix(images.shape[-2], size[0], vflip, dtype, images.device)
    columns = _resize_matrix(images.shape[-1], size[1], hflip, dtype, images.device)
    out = (rows @ gray @ columns.mT).unsqueeze(-3)
    return out / 255 if images.dtype == torch.uint8 else out.to(images.dtype)


def fused_transform(
    images: Tensor,
    size: tuple[int, int] = SIZE,
    *,
    hflip: bool | Tensor = True,
    vflip: bool | Tensor = True,
    out: Tensor | None = None,
) -> Tensor:
    """The same chain in one pass over the images, hand-written for the CPU and for CUDA.

    images: (..., 3, H, W), uint8 in [0, 255], or float16, bfloat16, float32 or float64, with any
    strides; none are copied. hflip, vflip: for all images, or a bool tensor (N,) that flips each
    image of an (N, 3, H, W) batch by itself. out: where to write the result; it may have any
    strides, but shares no memory with the images.
    Returns (..., 1, *size): float32 in [0, 1] for uint8, else the dtype of images; float16 and
    bfloat16 are reckoned in float32. A NaN or an infinity spreads as far as in torchvision.

    Differentiable twice and more for float images, not through out. The first use builds the
    operator if it is not built. Raises RuntimeError for a wrong shape, dtype, device or size, and
    where the operator cannot be built.
    """
    try:
        height, width = size
    except (TypeError, ValueError):
        raise TypeError(f"fused_transform: size must be (height, width), not {size!r}") from None
    if not (isinstance(images, Tensor) and (out is None or isinstance(out, Tensor))):
        raise TypeError("fused_transform: images and out must be tensors")
    hmask = vmask = None
    if not isinstance(hflip, bool):
        hflip, hmask = False, _mask("hflip", hflip)
    if not isinstance(vflip, bool):
        vflip, vmask = False, _mask("vflip", vflip)
    _load_operator()
    differentiated = images.requires_grad and torch.is_grad_enabled()
    try:
        if out is None:
            op = _forward if differentiated else _infer
            return op(images, height, width, hflip, vflip, hmask, vmask)
        if differentiated or (out.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError("fused_transform: out= records no gradient; use torch.no_grad()")
        _forward_out(images, height, width, hflip, vflip, hmask, vmask, out)
        return out
    except NotImplementedError as error:
        raise RuntimeError(
            f"fused_transform: no kernel for {images.layout} images on {images.device}. For CUDA, "
            "build the operator where the toolkit is: FORCE_CUDA=1 python setup.py build_ext "
            "--inplace"
        ) from error


class FusedTransform(nn.Module):
    """fused_transform as a module, a drop-in for the chain's four steps in `v2.Compose`."""

    def __init__(
        self, size: tuple[int, int] = SIZE, hflip: bool | Tensor = True, vflip: bool | Tensor = True
    ) -> None:
        super().__init__()
        self.size, self.hflip, self.vflip = size, hflip, vflip

    def forward(self, images: Tensor) -> Tensor:
        """images: (..., 3, H, W). Returns (..., 1, *size), as fused_transform."""
        return fused_transform(images, self.size, hflip=self.hflip, vflip=self.vflip)

    def extra_repr(self) -> str:
        return f"size={self.size}, hflip={self.hflip}, vflip={self.vflip}"


def _mask(name: str, flip) -> Tensor:
    if not isinstance(flip, Tensor):
        raise TypeError(f"fused_transform: {name} must be a bool or a bool tensor, not {flip!r}")
    return flip


_forward = _infer = _forward_out = None  # the operators, once they are loaded


@torch.compiler.assume_constant_result  # torch.compile runs this when it traces a call
def _load_operator() -> None:
    """Loads the library, once a process, and registers what C++ does not: fakes and gradients."""
    global _forward, _infer, _forward_out
    if _infer is not None:
        return
    from common._build import COMMAND, library

    path = library()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded: delete it and run {COMMAND}") from error
    ops = torch.ops.fused_transform
    for op in ("forward", "infer"):
        torch.library.register_fake(f"fused_transform::{op}", _fake_forward)
    torch.library.register_fake("fused_transform::backward", _fake_backward)
    torch.library.register_fake("fused_transform::forward_out", lambda *args: None)

    # the chain is linear: each of the two is the gradient of the other
    for op, adjoint in (("forward", ops.backward), ("backward", ops.forward)):
        torch.library.register_autograd(
            f"fused_transform::{op}",
            lambda ctx, grad, adjoint=adjoint: (
                adjoint.default(grad, *ctx.adjoint, *ctx.saved_tensors),
                *[None] * 6,
            ),
            setup_context=_save_for_adjoint,
        )
    _forward, _forward_out = ops.forward.default, ops.forward_out.default
    _infer = ops.infer.default


def _save_for_adjoint(ctx, inputs, output: Tensor) -> None:
    source, _, _, hflip, vflip, *masks = inputs
    ctx.adjoint = *source.shape[-2:], hflip, vflip
    ctx.save_for_backward(*masks)


def _fake_forward(images, height, width, hflip, vflip, hmask, vmask) -> Tensor:
    torch._check(images.dim() >= 3 and images.shape[-3] == 3, lambda: "images: (..., 3, H, W)")
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return images.new_empty((*images.shape[:-3], 1, height, width), dtype=dtype)


def _fake_backward(grad, height, width, hflip, vflip, hmask, vmask) -> Tensor:
    return grad.new_empty((*grad.shape[:-3], 3, height, width))
