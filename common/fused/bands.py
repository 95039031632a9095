"""Banded matrices: what a resize, crop, flip or blur does along one axis, as weights.

Every step of a linear chain is `out = matrix @ pixels` along each axis, and each row of the matrix
reads a few neighbouring pixels. The windows and weights are torch's own, computed in the dtype in
which torch computes them: a rounding decides which pixels lie under a filter, and with it where a
NaN spreads (aten/src/ATen/native/cpu/UpSampleKernel.cpp, aten/src/ATen/native/UpSample.h).
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

CPU = torch.device("cpu")  # named, as torch.set_default_device may say otherwise


@dataclass(frozen=True, eq=False)
class Bands:
    """V banded matrices of shape (out, size), on the CPU: row o of matrix v has the weights
    weight[v, o, :count[v, o]] from input pixel first[v, o] on, and zeros elsewhere.

    first, count: (V, out), int64. weight: (V, out, taps), float64, zero beyond count. A weight
    inside of a window may be zero: the pixel is still read, and a NaN in it spreads, as in torch.
    A row whose count is 0 reads nothing and gives 0.
    """

    first: Tensor
    count: Tensor
    weight: Tensor
    size: int

    @property
    def out(self) -> int:
        return self.first.shape[1]

    def __len__(self) -> int:
        return self.first.shape[0]

    def __repr__(self) -> str:
        taps = self.weight.shape[2]
        return f"Bands({self.size} -> {self.out} pixels, taps={taps}, variants={len(self)})"

    def flipped(self) -> "Bands":
        """The same, then a flip of the result."""
        return self._flipped

    @cached_property
    def _flipped(self) -> "Bands":
        return Bands(self.first.flip(1), self.count.flip(1), self.weight.flip(1), self.size)

    def select(self, index: Tensor) -> "Bands":
        """The variants index (N,), int64: one for each image."""
        return Bands(self.first[index], self.count[index], self.weight[index], self.size)

    def flipped_where(self, mask: Tensor) -> "Bands":
        """Variant v flipped where mask[v] is true. mask: bool (V,)."""
        order = torch.arange(self.out, device=CPU)
        order = torch.where(mask[:, None], self.out - 1 - order, order)
        weight = self.weight.gather(1, order[..., None].expand_as(self.weight))
        return Bands(self.first.gather(1, order), self.count.gather(1, order), weight, self.size)

    def then(self, other: "Bands") -> "Bands":
        """The product: first these bands, then the other ones, which read what these give. A
        window of the product runs from the first to the last pixel that it reads (see `gaps`)."""
        first, low, high, _, place = _windows(self, other)
        taps = max(int((high - low).max()), 1) if high.numel() else 1
        weight = other.weight[..., None] * _gather(self.weight, first)
        target = weight.new_zeros(*low.shape, taps)
        target.scatter_add_(2, place.flatten(2).clamp_(0, taps - 1), weight.flatten(2))
        return Bands(low, high - low, target, self.size)

    def gaps(self, other: "Bands") -> bool:
        """True where a window of `self.then(other)` covers a pixel that the two steps do not read:
        a NaN in it would spread further than in torch."""
        _, low, high, read, place = _windows(self, other)
        taps = max(int((high - low).max()), 1) if high.numel() else 1
        covered = torch.zeros(*low.shape, taps, dtype=torch.bool, device=CPU)
        covered = covered.scatter_reduce(
            2, place.flatten(2).clamp(0, taps - 1), read.flatten(2), reduce="amax"
        )
        return bool((covered.sum(2) < high - low).any())

    def transposed(self) -> "Bands":
        """The transposed matrices, (size, out): what the gradient needs. A window runs from the
        first to the last output that reads a pixel."""
        taps = torch.arange(self.weight.shape[2], device=CPU)
        read = taps < self.count[..., None]  # (V, out, taps)
        pixel = (self.first[..., None] + taps).where(read, self.size).flatten(1)
        output = torch.arange(self.out, device=CPU)[:, None].expand_as(read).flatten(1)
        shape = (len(self), self.size + 1)  # the last column takes what is not read
        last = torch.full(shape, -1, device=CPU).scatter_reduce(1, pixel, output, "amax")
        first = torch.full(shape, self.out, device=CPU).scatter_reduce(1, pixel, output, "amin")
        first, last = first[:, :-1], last[:, :-1]
        count = (last - first + 1).clamp(min=0)
        first = first.where(count > 0, 0)
        reach = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=CPU)
        place = (output - first.gather(1, pixel.clamp(max=self.size - 1))).clamp(0, len(reach) - 1)
        flat = (pixel * len(reach) + place).where(pixel < self.size, self.size * len(reach))
        weight = self.weight.new_zeros(len(self), self.size * len(reach) + 1)
        weight.scatter_(1, flat, self.weight.flatten(1))
        weight = weight[:, :-1].view(len(self), self.size, len(reach))
        return Bands(first, count, weight, self.out)

    def matrix(self) -> Tensor:
        """The dense matrices, (V, out, size), float64."""
        taps = torch.arange(self.weight.shape[2], device=CPU)
        pixel = (self.first[..., None] + taps).where(taps < self.count[..., None], self.size)
        dense = self.weight.new_zeros(*self.first.shape, self.size + 1)
        return dense.scatter_add(2, pixel, self.weight)[..., : self.size]


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values (V, out, ...) at rows index (V', ...): each variant its own; V or V' may be 1."""
    if len(values) == 1:
        return values[0][index]
    variant = torch.arange(len(values), device=CPU).view(-1, *[1] * (index.dim() - 1))
    return values[variant, index]


def _windows(bands: Bands, other: Bands) -> tuple[Tensor, ...]:
    """Of the product: the rows of `bands` that each tap of `other` reads (V, out, taps), the
    product's windows [low, high) (V, out), which taps of both are read and where the pixel of each
    lies in its window (both (V, out, taps of other, taps of bands))."""
    if other.size != bands.out:
        raise ValueError(f"bands of {other.size} pixels cannot follow bands of {bands.out}")
    taps = torch.arange(other.weight.shape[2], device=CPU)
    row = (other.first[..., None] + taps).clamp(max=max(bands.out - 1, 0))
    count = _gather(bands.count, row).where(taps < other.count[..., None], 0)
    first = _gather(bands.first, row)
    low = first.where(count > 0, bands.size).amin(2)
    high = (first + count).where(count > 0, 0).amax(2)
    low = low.minimum(high)  # a row that reads nothing
    inner = torch.arange(bands.weight.shape[2], device=CPU)
    return row, low, high, inner < count[..., None], first[..., None] + inner - low[..., None, None]


def stack(bands: list[Bands]) -> Bands:
    """Their variants one after the other. All have the same sizes."""
    taps = max(b.weight.shape[2] for b in bands)
    weight = [torch.nn.functional.pad(b.weight, (0, taps - b.weight.shape[2])) for b in bands]
    first = torch.cat([b.first for b in bands])
    return Bands(first, torch.cat([b.count for b in bands]), torch.cat(weight), bands[0].size)


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
    start: Tensor | None = None,
    length: Tensor | None = None,
) -> Bands:
    """torch.nn.functional.interpolate to `out` pixels: mode "bilinear" or "bicubic".

    dtype: that in which torch computes windows and weights: float64 for float64 images (and for
    uint8 ones), else float32. start, length: int64 (V,): resize each of these boxes inside of the
    image instead (RandomResizedCrop), a variant for each.
    """
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"no bands for mode {mode!r}: it must be 'bilinear' or 'bicubic'")
    if length is None:
        return _whole(size, out, mode, antialias, dtype)
    return _resize(size, out, mode, antialias, dtype, start, length)


@lru_cache(maxsize=512)  # a random crop of one image is a resize of a view: the sizes come again
def _whole(size, out, mode, antialias, dtype) -> Bands:
    return _resize(size, out, mode, antialias, dtype, None, torch.tensor([size], device=CPU))


def _resize(size, out, mode, antialias, dtype, start, length) -> Bands:
    length = length[:, None]
    scale = length.to(dtype) / out  # (V, 1)
    make = _antialiased if antialias else _interpolated
    first, count, weight = make(length, scale, torch.arange(out, device=CPU), mode, dtype)
    if antialias or mode == "bilinear":  # torch copies an axis whose size does not change
        same = length == out
        if bool(same.any()):
            first = torch.where(same, torch.arange(out, device=CPU), first)
            count = torch.where(same, 1, count)
            copy = torch.nn.functional.pad(weight.new_ones(1, 1, 1), (0, weight.shape[2] - 1))
            weight = torch.where(same[..., None], copy, weight)
    if start is not None:
        first = first + start[:, None]
    return Bands(first, count, weight.to(torch.float64), size)


def quantized(bands: Bands, bits: int) -> Bands:
    """The weights of a resize of uint8, rounded to multiples of the power of 2 that leaves the
    largest `bits` bits, at least 2**-22: 15 in torch; Pillow's are multiples of 2**-22 (bits=30).
    """
    largest = bands.weight.amax((1, 2), keepdim=True).clamp(min=2.0**-22)
    unit = torch.exp2(((2**bits - 0.5) / largest).log2().ceil().sub(1).clamp(max=22))
    weight = bands.weight * unit
    weight = (weight.abs() + 0.5).floor() * weight.sign() / unit
    return Bands(bands.first, bands.count, weight, bands.size)


def _antialiased(length, scale, output, mode, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A filter of the width of one output pixel (at least one input pixel), cut at the border and
    normalised. Pillow's, and so with a = -0.5 for bicubic."""
    stretch = scale.clamp(min=1)
    support = stretch * (1 if mode == "bilinear" else 2)
    center = (scale * (output.double() + 0.5)).to(dtype)
    first = ((center - support).double() + 0.5).to(torch.int64).clamp_(min=0)
    last = torch.minimum(((center + support).double() + 0.5).to(torch.int64), length)
    longest = 2 * support.ceil().to(torch.int64) + 1
    count = torch.minimum((last - first).clamp_(min=0), longest)
    taps = torch.arange(max(int(count.max()), 1) if count.numel() else 1, device=CPU)
    x = (first[..., None] + taps).to(dtype) - (center - 0.5)[..., None]
    x = x.mul_((1 / stretch)[..., None]).abs_()
    weight = (1 - x).clamp_(min=0) if mode == "bilinear" else _cubic(x, -0.5)
    weight *= taps < count[..., None]
    return first, count, weight / weight.sum(2, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel at the distances x >= 0."""
    near = _multiply_add(_multiply_add(x, a + 2, -a - 3) * x, x, 1)
    far = _multiply_add(_multiply_add(_multiply_add(x, a, -5 * a), x, 8 * a), x, -4 * a)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _multiply_add(x: Tensor, y: Tensor | float, z: float) -> Tensor:
    """x * y + z, rounded once or twice as this build of torch does it in float32."""
    if x.dtype == torch.float32 and _contracted():
        return (x.double() * y + z).float()
    return x * y + z


def _interpolated(length, scale, output, mode, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The 2 (bicubic: 4, with a = -0.75) pixels around the output pixel's center; those outside of
    the image are its border."""
    center = output.to(dtype) + 0.5
    position = _multiply_add(center.expand(len(scale), -1), scale, -0.5)
    if mode == "bilinear":
        position = position.clamp(min=0)
    # torch takes the floor in float32, whatever the dtype
    pixel = torch.minimum(position.to(torch.float32).floor().to(torch.int64), length - 1)
    t = (position - pixel).clamp(0, 1)[..., None]
    if mode == "bilinear":
        offsets, parts = torch.arange(2, device=CPU), torch.cat([1 - t, t], 2)
    else:
        offsets = torch.arange(-1, 3, device=CPU)
        parts = _cubic(torch.cat([t + 1, t, 1 - t, 2 - t], 2), -0.75)
    read = torch.minimum((pixel[..., None] + offsets).clamp(min=0), length[..., None] - 1)
    first = read[..., 0]
    weight = torch.zeros_like(parts).scatter_add(2, read - first[..., None], parts)
    return first, read[..., -1] - first + 1, weight


_fused_multiply_add: bool | None = None


def _contracted() -> bool:
    """Whether this build of torch fuses products and sums: its AVX2 and AVX-512 kernels do, the
    baseline does not. It moves the weights of a bilinear resize by up to 2e-5."""
    global _fused_multiply_add
    if _fused_multiply_add is None:
        size, out = 97, 500
        scale, center = torch.tensor(size / out), torch.arange(out, device=CPU) + 0.5
        apart, fused = scale * center - 0.5, (scale * center.double() - 0.5).float()
        row = int((apart - fused).abs().argmax())
        pixel = int(apart[row])
        image = torch.zeros(1, 1, 1, size, device=CPU)
        image[..., pixel + 1] = 1
        weight = torch.nn.functional.interpolate(image, (1, out), mode="bilinear")[0, 0, 0, row]
        error = (torch.stack([apart[row], fused[row]]) - pixel - weight).abs()
        _fused_multiply_add = bool(error[1] < error[0])
    return _fused_multiply_add


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
