"""The fused operator: a banded separable linear map of images with a channel mix, in one pass, on
the CPU and on CUDA; its derivatives; and the chain of the study on top of it."""

import threading
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _build
from .bands import Bands, resize, stack

SIZE = (28, 28)
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LANES = 16  # csrc/fused.h: kLanes, kHalf, HalfGroup
_GRAY = torch.tensor([GRAY_WEIGHTS], dtype=torch.float64)
_MIXES = {True: _GRAY / 255, False: _GRAY}  # images.dtype == torch.uint8: mix
_ops = None  # torch.ops.fused_transform, once the library is loaded


def separable_map(
    images: Tensor,
    rows: Bands,
    columns: Bands,
    mix: Tensor,
    bias: Tensor | None = None,
    *,
    row_index: Tensor | None = None,
    column_index: Tensor | None = None,
    low=None,
    high=None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out[n, k] = clamp(sum over c of mix[k, c] * (rows @ images[n, c] @ columns^T) + bias[k]).

    images: (..., C, H, W), uint8, float16, bfloat16, float32 or float64, with any strides; none are
    copied. rows, columns: bands from H to the result's height, from W to its width. mix: (C_out, C);
    a 0 is no term, so that a NaN does not spread through it. bias: (C_out,), or what `affine`
    returned, which saves a small image its cost. row_index, column_index: (N,) int64, which variant
    each image of an (N, C, H, W) batch takes; bool for two variants. low, high: numbers, or one for
    each channel of the result. dtype: the result's; by default float32 for uint8, else that of the
    images. A uint8 result is rounded to nearest (ties to even) and saturates.
    Sums are in float32, in float64 where images or result are float64.
    out: where to write the result; any strides, but no memory of the images.

    Differentiable with respect to float images in every mode of torch, not through out. Raises
    RuntimeError, TypeError or ValueError for what does not fit, before memory is touched.
    """
    if not (isinstance(images, Tensor) and (out is None or isinstance(out, Tensor))):
        raise TypeError("fused_transform: images and out must be tensors")
    if mix.dtype != torch.float64 or mix.device.type != "cpu":
        mix = mix.detach().to("cpu", torch.float64)
    if bias is not None or low is not None or high is not None:
        bias = affine(len(mix), bias, low, high)
    if dtype is None:
        dtype = _result_type(images.dtype)
    wide = images.dtype == torch.float64 or dtype == torch.float64
    plan = _Plan(rows, columns, wide, images.device)
    return _apply(images, plan, mix, bias, row_index, column_index, dtype, out)


def affine(channels: int, bias=None, low=None, high=None) -> Tensor:
    """(channels, 3) float64: what follows the mix, for `separable_map`'s bias. Each argument is
    None, a number, or one for each channel."""
    if isinstance(bias, Tensor) and bias.dim() == 2 and low is None and high is None:
        return bias
    table = torch.tensor([[0.0, -torch.inf, torch.inf]], dtype=torch.float64).repeat(channels, 1)
    for column, value in enumerate((bias, low, high)):
        if value is not None:
            table[:, column] = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    return table


def fused_transform(
    images: Tensor,
    size: tuple[int, int] = SIZE,
    *,
    hflip: bool | Tensor = True,
    vflip: bool | Tensor = True,
    out: Tensor | None = None,
) -> Tensor:
    """Resize(size, antialias=True) -> Grayscale -> horizontal flip -> vertical flip in one pass.

    images: (..., 3, H, W), uint8 in [0, 255], or float16, bfloat16, float32 or float64, with any
    strides; none are copied. hflip, vflip: for all images, or a bool tensor (N,) that flips each
    image of an (N, 3, H, W) batch by itself. out: where to write the result; it may have any
    strides, but shares no memory with the images.
    Returns (..., 1, *size): float32 in [0, 1] for uint8, else the dtype of images; sums are in
    float32 at least. A NaN or an infinity spreads as far as in torchvision.

    Differentiable for float images in every mode of torch, not through out. The first use builds
    the operator if it is not built. Raises RuntimeError, TypeError or ValueError for a wrong shape,
    dtype, device or size, and where the operator cannot be built.
    """
    try:
        height, width = size
        h, w = images.shape[-2:]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise _fault(images, size) from None
    hmask = vmask = None
    if hflip is not True and hflip is not False:
        hflip, hmask = None, _mask("hflip", hflip, images)
    if vflip is not True and vflip is not False:
        vflip, vmask = None, _mask("vflip", vflip, images)
    dtype = images.dtype
    try:
        plan = _chain_plan(h, w, height, width, hflip, vflip, dtype == torch.float64, images.device)
    except (TypeError, ValueError) as error:
        raise error from None
    mix = _MIXES[dtype == torch.uint8]
    return _apply(images, plan, mix, None, vmask, hmask, _result_type(dtype), out)


class FusedTransform(nn.Module):
    """fused_transform as a module, a drop-in for the chain's four steps in `v2.Compose`."""

    def __init__(
        self, size: tuple[int, int] = SIZE, hflip: bool | Tensor = True, vflip: bool | Tensor = True
    ) -> None:
        super().__init__()
        self.size = size
        for name, flip in (("hflip", hflip), ("vflip", vflip)):
            if isinstance(flip, Tensor):
                self.register_buffer(name, flip)  # follows .to(device)
            else:
                setattr(self, name, flip)

    def forward(self, images: Tensor) -> Tensor:
        """images: (..., 3, H, W). Returns (..., 1, *size), as fused_transform."""
        return fused_transform(images, self.size, hflip=self.hflip, vflip=self.vflip)

    def extra_repr(self) -> str:
        return f"size={self.size}, hflip={self.hflip}, vflip={self.vflip}"


def _result_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype


def _mask(name: str, flip, images: Tensor) -> Tensor:
    if not isinstance(flip, Tensor) or flip.dtype != torch.bool:
        what = flip.dtype if isinstance(flip, Tensor) else repr(flip)
        raise TypeError(f"fused_transform: {name} must be a bool or a bool tensor, not {what}")
    if images.dim() != 4 or flip.shape != images.shape[:1]:
        raise ValueError(
            f"fused_transform: {name} of shape {tuple(flip.shape)} must hold one flag for each image "
            f"of an (N, 3, H, W) batch, which is {tuple(images.shape)}"
        )
    if flip.device != images.device:
        raise ValueError(f"fused_transform: {name} must be on the device of the images")
    return flip


def _fault(images, size) -> Exception:
    """What is wrong with these two."""
    if not isinstance(images, Tensor):
        return TypeError("fused_transform: images and out must be tensors")
    try:
        _, _ = size
    except (TypeError, ValueError):
        return TypeError(f"fused_transform: size must be (height, width), not {size!r}")
    return _no_kernel(images) or ValueError(
        f"fused_transform: images must be (..., 3, H, W), not {tuple(images.shape)}"
    )


def _no_kernel(images: Tensor) -> RuntimeError | None:
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


def _aside(function, *arguments):
    """function(*arguments) in a thread of its own, which has none of this thread's modes: what is
    kept must not be a fake tensor, an inference tensor or one of a functorch level."""
    result = []

    def run() -> None:
        try:
            result.append((function(*arguments), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _pack(bands: Bands, wide: bool, device: torch.device) -> Tensor:
    """The kernels' layout of bands: csrc/fused.h."""
    first, count = bands.first.to(torch.int32), bands.count.to(torch.int32)
    variants, out = first.shape
    short = -out % LANES
    # the lanes behind the last output pixel repeat it
    taken = torch.arange(out + short).clamp(max=out - 1)
    weight = bands.weight.to(torch.float64 if wide else torch.float32)[:, taken]
    taps = weight.shape[2]
    halves = variants, -1, 2, LANES // 2
    first, count = first[:, taken].reshape(halves), count[:, taken].reshape(halves)
    low = first.where(count > 0, bands.size).amin(-1, keepdim=True)
    high = (first + count).where(count > 0, 0).amax(-1, keepdim=True)
    low = low.minimum(high)
    first = first.where(count > 0, low)
    spread = first.amax(-1, keepdim=True) - low
    least, most = count.amin(-1, keepdim=True), count.amax(-1, keepdim=True)
    span = torch.cat([low, high, least, most, spread, *[torch.zeros_like(low)] * 3], -1)
    lanes = weight.view(variants, -1, LANES, taps).mT.contiguous()
    parts = [x.reshape(variants, -1, 1, LANES) for x in (first, count, span)]
    parts.append(lanes.view(torch.int32).reshape(variants, parts[0].shape[1], -1, LANES))
    return torch.cat(parts, 2).to(device)


def _packed(bands: Bands, wide: bool, device: torch.device) -> Tensor:
    kept = bands.__dict__.setdefault("_packed", {})
    key = wide, device
    if key not in kept:
        kept[key] = _aside(_pack, bands, wide, device)
    return kept[key]


def _adjoint(bands: Bands) -> Bands:
    if "_adjoint" not in bands.__dict__:
        bands.__dict__["_adjoint"] = _aside(bands.transposed)
    return bands.__dict__["_adjoint"]


class _Plan:
    """Bands as the kernels take them."""

    def __init__(self, rows: Bands, columns: Bands, wide: bool, device: torch.device) -> None:
        self.bands, self.wide, self.device = (rows, columns), wide, device
        self.tables = tuple(_packed(b, wide, device) for b in self.bands)
        self.sizes = rows.size, columns.size, rows.first.shape[1], columns.first.shape[1]

    def transposed(self) -> tuple[Tensor, Tensor]:
        return tuple(_packed(_adjoint(b), self.wide, self.device) for b in self.bands)


@lru_cache(maxsize=64)
def _chain_plan(h, w, height, width, hflip, vflip, wide, device) -> _Plan:
    """The plan of the chain; a flip of None is one for each image."""
    if h < 1 or w < 1:
        raise ValueError(f"fused_transform: images must have at least one pixel, not {h} x {w}")
    for name, length in (("height", height), ("width", width)):
        if not isinstance(length, int):
            raise TypeError(f"fused_transform: size: '{name}' must be an integer, not {length!r}")
    if not (1 <= height < 2**30 and 1 <= width < 2**30):
        raise ValueError(
            "fused_transform: size must be two positive integers below 2**30, not "
            f"({height}, {width})"
        )
    dtype = torch.float64 if wide else torch.float32

    def axis(size: int, out: int, flip: bool | None) -> Bands:
        bands = resize(size, out, dtype=dtype)
        if flip is None:
            return stack([bands, bands.flipped()])
        return bands.flipped() if flip else bands

    return _aside(lambda: _Plan(axis(h, height, vflip), axis(w, width, hflip), wide, device))


def _is_plain(images: Tensor) -> bool:
    """Whether nothing but the kernel has to hear of a call on these images: no derivative, no
    transform of functorch, no trace."""
    return not (
        (images.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _apply(images, plan, mix, table, row_index, column_index, dtype, out) -> Tensor:
    load()
    arguments = mix, table, row_index, column_index, *plan.sizes, dtype
    try:
        if out is not None:
            _check_out(images, out)
            _ops.separable_map_out(images, *plan.tables, *arguments, out)
            return out
        if _is_plain(images):
            return _ops.separable_map(images, *plan.tables, *arguments)
        return _Map.apply(images, *plan.tables, *plan.transposed(), *arguments)
    except NotImplementedError as error:
        raise _no_kernel(images) or error from error


def _check_out(images: Tensor, out: Tensor) -> None:
    if torch.is_grad_enabled() and (images.requires_grad or out.requires_grad):
        raise RuntimeError("fused_transform: out= records no gradient; use torch.no_grad()")


class _Map(torch.autograd.Function):
    """The operator with its derivatives: it is linear, and its transpose is itself with the bands
    transposed."""

    @staticmethod
    def forward(images, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fused_transform.differentiable.default(images, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        images, *tables, mix, _table, row_index, column_index, h, w, oh, ow, dtype = inputs
        ctx.save_for_backward(*tables, mix, row_index, column_index)
        ctx.save_for_forward(*tables, mix, row_index, column_index)
        ctx.sizes, ctx.dtypes = (h, w, oh, ow), (images.dtype, dtype)

    @staticmethod
    def backward(ctx, grad):
        rows, columns, rows_t, columns_t, mix, *index = ctx.saved_tensors
        h, w, oh, ow = ctx.sizes
        tables = rows_t, columns_t, rows, columns
        grad = _Map.apply(grad, *tables, mix.mT, None, *index, oh, ow, h, w, ctx.dtypes[0])
        return grad, *[None] * 13

    @staticmethod
    def jvp(ctx, tangent, *_):
        if tangent is None:
            return None
        *tables, mix, row_index, column_index = ctx.saved_tensors
        index = row_index, column_index
        return _Map.apply(tangent, *tables, mix, None, *index, *ctx.sizes, ctx.dtypes[1])

    @staticmethod
    def vmap(info, in_dims, images, *arguments):
        *tables, mix, table, row_index, column_index, h, w, oh, ow, dtype = arguments
        image_dim, *others = in_dims
        index_dims = others[6:8]
        if any(dim is not None for dim in others[:6]):
            raise NotImplementedError("fused_transform: bands and mix cannot be batched by vmap")
        images = (
            images.expand(info.batch_size, *images.shape)
            if image_dim is None
            else images.movedim(image_dim, 0)
        )
        index = []
        for i, dim in zip((row_index, column_index), index_dims, strict=True):
            if i is not None:
                i = i.expand(info.batch_size, *i.shape) if dim is None else i.movedim(dim, 0)
                i = i.flatten()
            index.append(i)
        shape = images.shape
        if any(i is not None for i in index):
            images = images.flatten(0, 1)
        out = _Map.apply(images, *tables, mix, table, *index, h, w, oh, ow, dtype)
        return out.reshape(*shape[:-3], *out.shape[-3:]), 0


def _fake(images, rows, columns, mix, table, row_index, column_index, h, w, oh, ow, dtype):
    """The result without its values; refuses what the kernels refuse."""
    channels = mix.shape[1]
    for kind in (images.dtype, dtype):
        torch._check(
            kind in (torch.uint8, *FLOATS),
            lambda: f"images must be uint8, float16, bfloat16, float32 or float64, not {kind}",
        )
    torch._check(
        images.dim() >= 3 and images.shape[-3] == channels,
        lambda: f"fused_transform: images must be (..., {channels}, H, W), not {images.shape}",
    )
    torch._check(
        images.shape[-2] == h and images.shape[-1] == w,
        lambda: f"separable_map: the bands are for images of {h} x {w} pixels, not {images.shape}",
    )
    for index in (row_index, column_index):
        torch._check(
            index is None or (images.dim() == 4 and index.shape == images.shape[:1]),
            lambda: "separable_map: an index must hold one entry for each image of a batch",
        )
    return images.new_empty((*images.shape[:-3], mix.shape[0], oh, ow), dtype=dtype)


def _fake_out(*arguments) -> None:
    *arguments, out = arguments
    expected = _fake(*arguments)
    torch._check(
        out.shape == expected.shape and out.dtype == expected.dtype,
        lambda: f"fused_transform: out must be {expected.dtype} {tuple(expected.shape)}",
    )


def _fake_differentiable(images, rows, columns, rows_t, columns_t, *arguments):
    return _fake(images, rows, columns, *arguments)


def load() -> None:
    """Loads the library, once a process; builds it where it is missing."""
    global _ops
    if _ops is None:
        _aside(_register, _build.library())


def _register(path) -> None:
    global _ops, _autograd
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be loaded: delete it and run {_build.COMMAND}"
        ) from error
    name = "fused_transform"
    torch.library.register_fake(f"{name}::separable_map", _fake)
    torch.library.register_fake(f"{name}::separable_map_out", _fake_out)
    torch.library.register_fake(f"{name}::differentiable", _fake_differentiable)
    _autograd = torch.library.Library(name, "IMPL")
    _autograd.impl("differentiable", _Map.apply, "Autograd")
    _ops = torch.ops.fused_transform
