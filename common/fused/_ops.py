"""The library's operators: loaded, with the fakes and derivatives that C++ does not register."""

import inspect
from pathlib import Path

import torch

from . import _build
from ._layout import fork_safe_lock

NAMESPACE = "fused_transform"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
forward = forward_out = differentiable = None  # the operators, once they are loaded
_lock = fork_safe_lock()


def load() -> None:
    """Loads the library, once a process; builds it where it is missing."""
    with _lock:
        if forward is None:
            _load(_build.library())


def load_if_built() -> None:
    """At import: an exported program needs the operators. What fails is reported at first use."""
    path = _build.built_library()
    if path is not None:
        try:
            _load(path)
        except RuntimeError:
            return


def _load(path: Path) -> None:
    global forward, forward_out, differentiable
    others = [other for other in torch.ops.loaded_libraries if Path(other).name != path.name]
    others = [other for other in others if Path(other).name.startswith("_fused_")]
    if others:
        raise RuntimeError(
            f"fused_transform: this process has loaded {others[0]}, of another version of this "
            f"package, and cannot load {path} beside it: import one of the two"
        )
    if not any(Path(other).name == path.name for other in torch.ops.loaded_libraries):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise RuntimeError(
                f"{path} cannot be loaded: delete it and run {_build.COMMAND}"
            ) from error
    ops = getattr(torch.ops, NAMESPACE)
    # Registered once a process, and kept on `ops`: others may have loaded the library, and this
    # module may be imported under two names (installed, and from its sources) or reloaded. Without
    # the registrations a gradient would be lost in silence.
    if "registrations" not in vars(ops):
        torch.library.register_fake(f"{NAMESPACE}::separable_map", fake_plain)
        torch.library.register_fake(f"{NAMESPACE}::separable_map_out", fake_out)
        torch.library.register_fake(f"{NAMESPACE}::differentiable", fake_differentiable)
        autograd = torch.library.Library(NAMESPACE, "IMPL")
        autograd.impl("differentiable", Map.apply, "Autograd")
        ops.registrations = autograd  # which ends with its object
    forward_out = ops.separable_map_out.default
    differentiable = ops.differentiable.default
    forward = ops.separable_map.default


class Map(torch.autograd.Function):
    """The operator with its derivatives: it is linear, and its transpose is itself with the bands
    transposed."""

    @staticmethod
    def forward(images, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return differentiable(images, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        images, *tables, mix, _, row_index, column_index, h, w, oh, ow, dtype = inputs
        ctx.save_for_backward(*tables, mix, row_index, column_index)
        ctx.save_for_forward(*tables, mix, row_index, column_index)
        ctx.sizes, ctx.dtypes = (h, w, oh, ow), (images.dtype, dtype)

    @staticmethod
    def backward(ctx, grad):
        rows, columns, rows_t, columns_t, mix, *index = ctx.saved_tensors
        h, w, oh, ow = ctx.sizes
        tables = rows_t, columns_t, rows, columns
        grad = Map.apply(grad, *tables, mix.mT, None, *index, oh, ow, h, w, ctx.dtypes[0])
        return grad, *[None] * 13

    @staticmethod
    def jvp(ctx, tangent, *_):
        if tangent is None:
            return None
        *tables, mix, row_index, column_index = ctx.saved_tensors
        index = row_index, column_index
        return Map.apply(tangent, *tables, mix, None, *index, *ctx.sizes, ctx.dtypes[1])

    @staticmethod
    def vmap(info, in_dims, images, *arguments):
        *tables, mix, affine, row_index, column_index, h, w, oh, ow, dtype = arguments
        image_dim, *dims = in_dims
        if any(dim is not None for dim in dims[:6]):
            raise NotImplementedError("fused_transform: vmap over bands or a mix is not supported")

        def batched(x, dim):
            return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

        images = batched(images, image_dim)
        shape = images.shape
        index = [
            None if i is None else batched(i, dim).flatten()
            for i, dim in zip((row_index, column_index), dims[6:8], strict=True)
        ]
        if index != [None, None]:
            images = images.flatten(0, 1)
        out = Map.apply(images, *tables, mix, affine, *index, h, w, oh, ow, dtype)
        return out.reshape(*shape[:-3], *out.shape[-3:]), 0


# autograd.Function asks for it at every call: of a small image a fifth of the time
Map.forward.__signature__ = inspect.signature(Map.forward)


def fake(images, rows, columns, mix, affine, row_index, column_index, h, w, oh, ow, dtype):
    """The result without its values; refuses what the kernels refuse."""
    for kind in (images.dtype, dtype):
        torch._check(
            kind in (torch.uint8, *FLOATS),
            lambda kind=kind: (
                "fused_transform: images must be uint8, float16, bfloat16, float32 or float64, "
                f"not {kind}"
            ),
        )
    torch._check(
        images.dim() >= 3 and images.shape[-3] == mix.shape[1],
        lambda: f"fused_transform: images must be (..., {mix.shape[1]}, H, W): {images.shape}",
    )
    torch._check(
        images.shape[-2] == h and images.shape[-1] == w,
        lambda: f"separable_map: the bands are for images of {h} x {w} pixels: {images.shape}",
    )
    for name, table, index in (("rows", rows, row_index), ("columns", columns, column_index)):
        torch._check(
            table.device == images.device and (index is None or index.device == images.device),
            lambda name=name: f"separable_map: {name} must be on the device of the images",
        )
        torch._check(
            index is None or (images.dim() == 4 and index.shape == images.shape[:1]),
            lambda name=name: (
                f"separable_map: the index of the {name} must hold one entry for each image"
            ),
        )
    return images.new_empty((*images.shape[:-3], mix.shape[0], oh, ow), dtype=dtype)


def fake_plain(images, rows, columns, mix, sizes, affine, row_index, column_index, dtype):
    dtype = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(2)]
    h, w = images.shape[-2:]
    return fake(images, rows, columns, mix, affine, row_index, column_index, h, w, *sizes, dtype)


def fake_out(images, rows, columns, mix, sizes, affine, row_index, column_index, dtype, out):
    dtype = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    (h, w), (oh, ow) = images.shape[-2:], out.shape[-2:]
    index = row_index, column_index
    expected = fake(images, rows, columns, mix, affine, *index, h, w, oh, ow, dtype)
    torch._check(
        out.shape == expected.shape and out.dtype == expected.dtype,
        lambda: f"fused_transform: out must be {expected.dtype} {tuple(expected.shape)}",
    )


def fake_differentiable(images, rows, columns, rows_t, columns_t, *arguments):
    return fake(images, rows, columns, *arguments)
