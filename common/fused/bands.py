"""The bands of resizes, crops and blurs, as torch and torchvision compute them.

Windows and weights are computed in the dtype in which torch computes them: a rounding decides which
pixels lie under a filter, and with it where a NaN spreads (aten/src/ATen/native/UpSample.h and
aten/src/ATen/native/cpu/UpSampleKernel.cpp).
"""

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

from .banded import CPU, Bands, stack

__all__ = [
    "CPU",
    "Bands",
    "blur",
    "crop",
    "identity",
    "quantized",
    "resize",
    "resize_each",
    "stack",
]


@lru_cache(maxsize=512)
def identity(size: int) -> Bands:
    first = torch.arange(size, device=CPU)[None]
    weight = torch.ones(1, size, 1, dtype=torch.float64, device=CPU)
    return Bands(first, torch.ones_like(first), weight, size)


def crop(size: int, start: int | Tensor, length: int, mode: str = "constant") -> Bands:
    """length pixels from `start` on (an int, or int64 (V,)). Beyond the image, by torchvision's
    padding modes: 0 ("constant"), its last pixel ("edge"), or the image mirrored at its last pixel
    ("reflect") or behind it ("symmetric")."""
    start = torch.as_tensor(start, device=CPU).view(-1, 1)
    pixel = start + torch.arange(length, device=CPU)
    inside = (pixel >= 0) & (pixel < size)
    if mode == "constant":
        weight = inside.to(torch.float64)[..., None]
        return Bands(pixel.clamp(0, size - 1), inside.to(torch.int64), weight, size)
    if mode == "edge":
        pixel = pixel.clamp(0, size - 1)
    else:
        shift = 1 if mode == "symmetric" else 0
        pixel = torch.where(pixel < 0, -pixel - shift, pixel)
        pixel = torch.where(pixel >= size, 2 * (size - 1) + shift - pixel, pixel)
        if bool(((pixel < 0) | (pixel >= size)).any()):
            raise ValueError(
                f"padding by mode {mode!r} must be smaller than the image: {size} pixels"
            )
    one = torch.ones_like(pixel)
    return Bands(pixel, one, one.to(torch.float64)[..., None], size)


def resize(
    size: int,
    out: int,
    mode: str = "bilinear",
    antialias: bool = True,
    dtype: torch.dtype = torch.float32,
    *,
    channels: int = 3,
) -> Bands:
    """torch.nn.functional.interpolate to `out` pixels: mode "bilinear" or "bicubic".

    dtype: that in which torch computes windows and weights: float64 for float64 images (and for
    uint8 ones), else float32. channels: of the images, as torch's kernel for three may round
    otherwise.
    """
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"no bands for mode {mode!r}: it must be 'bilinear' or 'bicubic'")
    return resize_each([size], out, mode, antialias, dtype, channels)


def resize_each(lengths: list[int], out, mode, antialias, dtype, channels) -> Bands:
    """`resize` of images of these lengths, a variant for each."""
    length = torch.tensor(lengths, device=CPU)[:, None]
    scale = length.to(dtype) / out  # (V, 1)
    make = _antialiased if antialias else _interpolated
    fused = dtype == torch.float32 and _contracted(mode, channels)
    first, count, weight = make(length, scale, torch.arange(out, device=CPU), mode, dtype, fused)
    if out in lengths and (antialias or mode == "bilinear"):  # torch copies such an axis
        same = length == out
        first = torch.where(same, torch.arange(out, device=CPU), first)
        count = torch.where(same, 1, count)
        weight[same[:, 0]] = torch.eye(1, weight.shape[2], dtype=dtype, device=CPU)
    return Bands(first, count, weight.to(torch.float64), max(lengths))


def quantized(bands: Bands, bits: int) -> Bands:
    """The weights of a resize of uint8, rounded to multiples of the power of 2 that leaves the
    largest `bits` bits, at least 2**-22: 15 in torch; Pillow's are multiples of 2**-22 (bits=30).
    """
    largest = bands.weight.amax((1, 2), keepdim=True).clamp(min=2.0**-22)
    unit = torch.exp2(((2**bits - 0.5) / largest).log2().ceil().sub(1).clamp(max=22))
    weight = bands.weight * unit
    weight = (weight.abs() + 0.5).floor() * weight.sign() / unit
    return Bands(bands.first, bands.count, weight, bands.size)


def _antialiased(length, scale, output, mode, dtype, fused) -> tuple[Tensor, Tensor, Tensor]:
    """A filter of the width of one output pixel (at least one input pixel), cut at the border and
    normalised. Pillow's, and so with a = -0.5 for bicubic."""
    stretch = scale.clamp(min=1)
    support = stretch * (1 if mode == "bilinear" else 2)
    center = (scale * (output.double() + 0.5)).to(dtype)
    first = ((center - support).double() + 0.5).to(torch.int64).clamp_(min=0)
    last = torch.minimum(((center + support).double() + 0.5).to(torch.int64), length)
    longest = 2 * support.ceil().to(torch.int64) + 1
    count = torch.minimum((last - first).clamp_(min=0), longest)
    taps = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=CPU)[:, None]
    # in place and the taps outermost, as the random crops of a batch make these anew for each
    x = first[:, None].to(dtype) + taps.to(dtype)  # (V, taps, out)
    x = x.sub_((center - 0.5)[:, None]).mul_((1 / stretch)[:, None]).abs_()
    weight = x.neg_().add_(1).clamp_(min=0) if mode == "bilinear" else _cubic(x, -0.5, fused)
    weight.masked_fill_(taps >= count[:, None], 0)
    # one after the other, as in torch: a box is none of the others' business, however many taps
    # they have
    total = reduce(torch.add, weight.unbind(1))
    return first, count, weight.div_(total[:, None]).mT


def _cubic(x: Tensor, a: float, fused: bool) -> Tensor:
    """Keys' cubic convolution kernel at the distances x >= 0."""

    def add(y: Tensor, factor: Tensor | float, z: float) -> Tensor:
        return _multiply_add(y, factor, z, fused)

    near = add(add(x, a + 2, -a - 3) * x, x, 1)
    far = add(add(add(x, a, -5 * a), x, 8 * a), x, -4 * a)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _multiply_add(x: Tensor, y: Tensor | float, z: float, fused: bool) -> Tensor:
    """x * y + z, in float32 rounded once where `fused`, else twice."""
    return (x.double() * y + z).float() if fused else x * y + z


def _interpolated(length, scale, output, mode, dtype, fused) -> tuple[Tensor, Tensor, Tensor]:
    """The 2 (bicubic: 4, with a = -0.75) pixels around the output pixel's center; those outside of
    the image are its border."""
    center = output.to(dtype) + 0.5
    position = _multiply_add(center.expand(len(scale), -1), scale, -0.5, fused)
    if mode == "bilinear":
        position = position.clamp(min=0)
    # torch takes the floor in float32, whatever the dtype
    pixel = torch.minimum(position.to(torch.float32).floor().to(torch.int64), length - 1)
    t = (position - pixel).clamp(0, 1)[..., None]
    if mode == "bilinear":
        offsets, parts = torch.arange(2, device=CPU), torch.cat([1 - t, t], 2)
    else:
        offsets = torch.arange(-1, 3, device=CPU)
        parts = _cubic(torch.cat([t + 1, t, 1 - t, 2 - t], 2), -0.75, fused)
    read = torch.minimum((pixel[..., None] + offsets).clamp(min=0), length[..., None] - 1)
    first = read[..., 0]
    weight = torch.zeros_like(parts).scatter_add(2, read - first[..., None], parts)
    return first, read[..., -1] - first + 1, weight


@lru_cache
def _contracted(mode: str, channels: int) -> bool:
    """Whether this build of torch fuses products and sums, for images of so many channels: its AVX2
    and AVX-512 kernels do, the baseline does not; in torch 2.15 the bilinear one does for three
    channels and not for one. It moves the weights of a bilinear resize by up to 2e-5."""
    size, out = 97, 500
    image = torch.eye(size, device=CPU).expand(1, channels, size, size)
    image = image.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.interpolate(image, (out, size), mode=mode)[0, 0].double()
    length = torch.tensor([[size]], device=CPU)
    how = length, length / out, torch.arange(out, device=CPU), mode, torch.float32
    apart, fused = (Bands(*_interpolated(*how, fused), size) for fused in (False, True))
    apart, fused = ((each.matrix()[0] - expected).abs().max() for each in (apart, fused))
    return bool(fused < apart)


def blur(size: int, kernel_size: int, sigma: float, dtype: torch.dtype = torch.float32) -> Bands:
    """torchvision's GaussianBlur: its kernel, the border reflected. dtype: of the kernel."""
    radius = kernel_size // 2
    if radius >= size:
        raise ValueError(f"a blur of {kernel_size} pixels needs more than {radius}, not {size}")
    limit = (kernel_size - 1) / (2 * math.sqrt(2))
    x = torch.linspace(-limit, limit, kernel_size, dtype=dtype, device=CPU)
    kernel = torch.softmax(x.div(sigma).pow(2).neg(), dim=0).to(torch.float64)
    output = torch.arange(size, device=CPU)[:, None]
    read = (output + torch.arange(-radius, radius + 1, device=CPU)).abs()
    read = torch.where(read >= size, 2 * (size - 1) - read, read)
    first, last = read.amin(1, keepdim=True), read.amax(1, keepdim=True)
    weight = kernel.new_zeros(size, kernel_size).scatter_add(
        1, read - first, kernel.expand(size, -1)
    )
    taps = max(int((last - first).max()) + 1, 1)
    return Bands(first.T, (last - first + 1).T, weight[None, :, :taps], size)
