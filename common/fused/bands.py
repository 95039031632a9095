"""The bands of resizes, crops and blurs, as torch and torchvision compute them.

Windows and weights are computed in the dtype in which torch computes them: a rounding decides which
pixels lie under a filter, and with it where a NaN spreads (aten/src/ATen/native/UpSample.h and
aten/src/ATen/native/cpu/UpSampleKernel.cpp).
"""

import math
import platform
from functools import lru_cache, reduce

import numpy as np
import PIL
import torch

from .banded import CPU, Bands, stack

__all__ = [
    "CPU",
    "Bands",
    "blur",
    "columns_first",
    "crop",
    "identity",
    "quantized",
    "resize",
    "resize_each",
    "resizes_uint8",
    "stack",
]


@lru_cache(maxsize=512)
def identity(size: int) -> Bands:
    first = torch.arange(size, device=CPU)[None]
    weight = torch.ones(1, size, 1, dtype=torch.float64, device=CPU)
    return Bands(first, torch.ones_like(first), weight, size)


def crop(size: int, start: int, length: int, mode: str = "constant") -> Bands:
    """length pixels from `start` on. Beyond the image, by torchvision's padding modes: 0
    ("constant"), its last pixel ("edge"), or the image mirrored at its last pixel ("reflect") or
    behind it ("symmetric")."""
    pixel = start + torch.arange(length, device=CPU)[None]
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
    # by numpy: of arrays as small as these it takes a third of torch's time
    length, output = np.array(lengths, np.int64)[:, None], np.arange(out)
    make = _antialiased if antialias else _interpolated
    fused = dtype == torch.float32 and _contracted(mode, channels)
    float_ = np.float64 if dtype == torch.float64 else np.float32
    scale = length.astype(float_) / out  # (V, 1)
    first, count, weight = make(length, scale, output, mode, float_, fused)
    if out in lengths and (antialias or mode == "bilinear"):  # torch copies such an axis
        same = length == out
        first, count = np.where(same, output, first), np.where(same, 1, count)
        weight[same[:, 0]] = np.eye(1, weight.shape[2])
    weight = np.ascontiguousarray(weight, np.float64)
    return Bands(*map(torch.from_numpy, (first, count, weight)), max(lengths))


def quantized(bands: Bands, bits: int) -> Bands:
    """The weights of a resize of uint8, rounded to multiples of the power of 2 that leaves the
    largest `bits` bits, at least 2**-22: 15 in torch; Pillow's are multiples of 2**-22 (bits=30).
    """
    largest = bands.weight.amax((1, 2), keepdim=True).clamp(min=2.0**-22)
    unit = torch.exp2(((2**bits - 0.5) / largest).log2().ceil().sub(1).clamp(max=22))
    weight = bands.weight * unit
    weight = (weight.abs() + 0.5).floor() * weight.sign() / unit
    return Bands(bands.first, bands.count, weight, bands.size)


def _antialiased(length, scale, output, mode, float_, fused) -> tuple[np.ndarray, ...]:
    """A filter of the width of one output pixel (at least one input pixel), cut at the border and
    normalised. Pillow's, and so with a = -0.5 for bicubic."""
    stretch = np.maximum(scale, 1)
    support = stretch * (1 if mode == "bilinear" else 2)
    center = (scale * (output + 0.5)).astype(float_)
    low, high = (x.astype(np.float64) + 0.5 for x in (center - support, center + support))
    first = np.maximum(low.astype(np.int64), 0)
    last = np.minimum(high.astype(np.int64), length)
    longest = 2 * np.ceil(support).astype(np.int64) + 1
    count = np.minimum(np.maximum(last - first, 0), longest)
    taps = np.arange(count.max(initial=1))[:, None]
    x = first[:, None].astype(float_) + taps.astype(float_)  # (V, taps, out)
    x = np.abs((x - (center - float_(0.5))[:, None]) * (1 / stretch)[:, None])
    weight = np.maximum(1 - x, 0) if mode == "bilinear" else _cubic(x, -0.5, fused)
    weight = np.where(taps < count[:, None], weight, 0)
    # summed in order, as in torch: a window's sum must not depend on how many taps others have
    total = reduce(np.add, weight.swapaxes(0, 1))
    return first, count, (weight / total[:, None]).swapaxes(1, 2)


def _cubic(x: np.ndarray, a: float, fused: bool) -> np.ndarray:
    """Keys' cubic convolution kernel at the distances x >= 0."""

    def add(y: np.ndarray, factor: np.ndarray | float, z: float) -> np.ndarray:
        return _multiply_add(y, factor, z, fused)

    near = add(add(x, a + 2, -a - 3) * x, x, 1)
    far = add(add(add(x, a, -5 * a), x, 8 * a), x, -4 * a)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _multiply_add(x: np.ndarray, y: np.ndarray | float, z: float, fused: bool) -> np.ndarray:
    """x * y + z, in float32 rounded once where `fused`, else twice."""
    return (x.astype(np.float64) * y + z).astype(np.float32) if fused else x * y + z


def _interpolated(length, scale, output, mode, float_, fused) -> tuple[np.ndarray, ...]:
    """The 2 (bicubic: 4, with a = -0.75) pixels around the output pixel's center; those outside of
    the image are its border."""
    center = output.astype(float_) + float_(0.5)
    position = _multiply_add(center[None], scale, -0.5, fused)
    if mode == "bilinear":
        position = np.maximum(position, 0)
    # torch takes the floor in float32, whatever the dtype
    pixel = np.minimum(np.floor(position.astype(np.float32)).astype(np.int64), length - 1)
    t = (position - pixel.astype(float_)).clip(0, 1)[..., None]
    if mode == "bilinear":
        offsets, parts = np.arange(2), np.concatenate([1 - t, t], 2)
    else:
        offsets = np.arange(-1, 3)
        parts = _cubic(np.concatenate([t + 1, t, 1 - t, 2 - t], 2), -0.75, fused)
    read = np.minimum(np.maximum(pixel[..., None] + offsets, 0), length[..., None] - 1)
    first = read[..., 0]
    weight = np.zeros_like(parts)
    for place, part in zip(np.moveaxis(read, 2, 0) - first, np.moveaxis(parts, 2, 0), strict=True):
        weight += np.where(place[..., None] == np.arange(len(offsets)), part[..., None], 0)
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
    length = np.array([[size]])
    how = length, length.astype(np.float32) / out, np.arange(out), mode, np.float32
    apart, fused = (map(torch.from_numpy, _interpolated(*how, fused)) for fused in (False, True))
    apart, fused = (
        (Bands(first, count, weight.double(), size).matrix()[0] - expected).abs().max()
        for first, count, weight in (apart, fused)
    )
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


def columns_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow makes the vertical pass first; it rounds after each pass. It makes the
    horizontal pass first, as torch does, but since version 13 not where the height shrinks more
    than twice as much as the width (Pillow's pull request 9549)."""
    shrinks = height - new_height
    return shrinks > max(0, 2 * (width - new_width)) and int(PIL.__version__.split(".")[0]) >= 13


@lru_cache
def resizes_uint8(mode: str) -> bool:
    """Whether torchvision resizes uint8 tensors on this CPU as such, not as float32."""
    arm = platform.machine() in ("aarch64", "arm64")
    return mode == "bicubic" or arm or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
