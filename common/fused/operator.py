"""The fused operator: a banded separable linear map of images with a channel mix, in one pass, on
the CPU and on CUDA; its derivatives; and the chain of the study on top of it."""

from operator import index

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import _checks, _ops
from ._layout import Plan, aside, chain_plan, sizes_tensor
from .bands import CPU, Bands
from .colour import affine, unclamped

SIZE = (28, 28)
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_GRAY = torch.tensor([GRAY_WEIGHTS], dtype=torch.float64, device=CPU)
_MIXES = {True: _GRAY / 255, False: _GRAY}  # images.dtype == torch.uint8: mix
KNOWN = 256
_known: dict[tuple, tuple] = {}  # of fused_transform: what a call depends on, its arguments


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
    copied. rows, columns: bands from H to the result's height and from W to its width. mix:
    (C_out, C), at most 16 each; a 0 is no term, so no NaN spreads through it. bias: (C_out,), or
    what `affine` returned, which is faster for small images. row_index, column_index: (N,) int64,
    which variant each image of an (N, C, H, W) batch takes; bool for two variants. low, high:
    numbers, or one for each channel of the result. dtype: the result's; by default float32 for
    uint8, else that of the images. A uint8 result is rounded to nearest (ties to even) and
    saturates.
    Sums are in float32, in float64 where images or result are float64.
    out: where to write the result; any strides, but no memory of the images.

    Differentiable with respect to float images in every mode of torch, not through out. Raises
    RuntimeError, TypeError or ValueError for what does not fit, before memory is touched.
    """
    if not (isinstance(images, Tensor) and (out is None or isinstance(out, Tensor))):
        raise TypeError("fused_transform: images and out must be tensors")
    _checks.check_constants(mix, bias, low, high)
    if mix.dtype != torch.float64 or mix.device.type != "cpu":
        mix = mix.detach().to("cpu", torch.float64)
    if bias is not None or low is not None or high is not None:
        bias = affine(len(mix), bias, low, high)
    if dtype is None:
        dtype = _result_type(images.dtype)
    wide = images.dtype == torch.float64 or dtype == torch.float64
    if torch.compiler.is_compiling():
        tables = _map_tables(rows, columns, wide, images.device)
        sizes = rows.size, columns.size, rows.out, columns.out
        return _traced(images, tables, sizes, mix, bias, row_index, column_index, dtype, out)
    plan = Plan(rows, columns, wide, images.device)
    return apply_plan(images, plan, mix, bias, row_index, column_index, dtype, out)


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
    if not torch.compiler.is_compiling() and isinstance(hflip, bool) and isinstance(vflip, bool):
        # for one small image the arguments cost more than the kernel: they are cached
        try:
            known = _known.get((images.shape, images.dtype, images.device, size, hflip, vflip))
        except (TypeError, AttributeError, RuntimeError):
            known = None  # something is wrong
        if known is not None and images.layout == torch.strided and _is_plain(images):
            if out is None:
                return _ops.forward(images, *known)
            if isinstance(out, Tensor) and not out.requires_grad:
                return _write(images, *known, out)
    try:
        height, width = size
        h, w = images.shape[-2:]
        h, w = index(h), index(w)  # under torch.compile a dynamic size becomes a constant
    except (TypeError, ValueError, AttributeError, RuntimeError):
        raise _checks.fault(images, size) from None
    if not (isinstance(images, Tensor) and (out is None or isinstance(out, Tensor))):
        raise _checks.fault(None, size)
    hmask = vmask = None
    if hflip is not True and hflip is not False:
        hflip, hmask = None, _checks.mask("hflip", hflip, images)
    if vflip is not True and vflip is not False:
        vflip, vmask = None, _checks.mask("vflip", vflip, images)
    dtype = images.dtype
    mix = _MIXES[dtype == torch.uint8]
    plan = h, w, height, width, hflip, vflip, dtype == torch.float64, images.device
    if torch.compiler.is_compiling():
        tables, sizes = _chain_tables(*plan), (h, w, height, width)
        return _traced(images, tables, sizes, mix, None, vmask, hmask, None, out)
    plan = chain_plan(*plan)
    result = apply_plan(images, plan, mix, None, vmask, hmask, None, out)
    if hmask is None and vmask is None and type(images) is Tensor:
        if len(_known) >= KNOWN:
            _known.clear()
        arguments = *plan.tables, mix, plan.sizes, None, None, None, None
        _known[images.shape, dtype, images.device, size, hflip, vflip] = arguments
    return result


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


def _is_plain(images: Tensor) -> bool:
    """Whether nothing but the kernel has to hear of a call on these images: no derivative, no
    transform of functorch, no trace. Asked in each call, so in private names, which cost less."""
    return not (
        (images.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or images.is_meta
    )


def _write(images, *arguments) -> Tensor:
    """Writes into the last argument, and tells autograd, so that a backward pass that needs what
    stood there raises."""
    out = arguments[-1]
    _ops.forward_out(images, *arguments)
    if not out.is_inference():
        torch._C._increment_version((out,))  # torch.autograd.graph.increment_version, but faster
    return out


def apply_plan(images, plan, mix, affine, row_index, column_index, dtype, out) -> Tensor:
    """`separable_map`, its arguments prepared."""
    if _ops.forward is None:
        _ops.load()
    options = affine, row_index, column_index, dtype
    try:
        if out is not None:
            _checks.check_out(images, out)
            return _write(images, *plan.tables, mix, plan.sizes, *options, out)
        if _is_plain(images):
            return _ops.forward(images, *plan.tables, mix, plan.sizes, *options)
        tables = *plan.tables, *plan.transposed()
        return _apply_recorded(images, tables, mix, plan.numbers, *options)
    except NotImplementedError as error:
        raise _checks.no_kernel(images) or error from error


def _apply_recorded(images, tables, mix, sizes, affine, row_index, column_index, dtype) -> Tensor:
    """The same where a derivative or a trace may be wanted. The operator itself is linear, so what
    clamps comes after it."""
    dtype = dtype or _result_type(images.dtype)
    bounds = None
    if affine is not None and dtype.is_floating_point:
        direct = torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()
        affine, bounds = unclamped(affine) if direct else aside(unclamped, affine)
    if isinstance(images, FakeTensor) and not images.fake_mode.allow_non_fake_inputs:
        *tables, mix, affine, bounds = (
            None if x is None else images.fake_mode.from_tensor(x)
            for x in (*tables, mix, affine, bounds)
        )
    traced = torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    apply = torch.ops.fused_transform.differentiable.default if traced else _ops.Map.apply
    out = apply(images, *tables, mix, affine, row_index, column_index, *sizes, dtype)
    return out if bounds is None else out.clamp(*bounds.to(out.device, out.dtype))


def _traced(images, tables, sizes, mix, affine, row_index, column_index, dtype, out) -> Tensor:
    """For torch.compile."""
    options = affine, row_index, column_index, dtype
    if out is None:
        return _apply_recorded(images, tables, mix, sizes, *options)
    _checks.check_out(images, out)
    table = _sizes_table(*sizes)
    op = torch.ops.fused_transform.separable_map_out.default
    op(images, *tables[:2], mix, table, *options, out)
    return out


@torch.compiler.assume_constant_result
def _sizes_table(*sizes: int) -> Tensor:
    return sizes_tensor(*sizes)


@torch.compiler.assume_constant_result
def _chain_tables(*arguments) -> tuple[Tensor, ...]:
    """For torch.compile, which runs this when it traces a call: the bands are constants."""
    _ops.load()
    plan = chain_plan(*arguments)
    return *plan.tables, *plan.transposed()


@torch.compiler.assume_constant_result
def _map_tables(rows: Bands, columns: Bands, wide: bool, device) -> tuple[Tensor, ...]:
    _ops.load()
    plan = Plan(rows, columns, wide, device)
    return *plan.tables, *plan.transposed()
