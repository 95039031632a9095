"""A fast path for the CNN and the perceptual loss on CPUs with native bfloat16.

Training steps per second against the plain modules, two cores, `python -m tests.manual.cnn_step`:

    processor, dtype                  CNN     perceptual loss, 224 px
    Xeon with AMX, bfloat16           1.90    3.51    (both rows at commit be81acf,
    EPYC with AVX512-BF16, bfloat16   1.47    1.71     which had the same kernels)
    Xeon with AVX512-BF16, bfloat16   1.38    1.17    (float32 is faster than bfloat16 there)
    EPYC with AVX2 alone, float32     1.3     1.0

So float32 runs the plain modules. So does whatever could show a difference: hooks, changed layers,
torch.compile, torch.func. A second derivative is that of the plain formula; batched gradients
(`is_grads_batched`) raise, and dropout draws other numbers than the plain modules. `status` tells
what ran and why. FAST_CPU=0 in the environment or `enable(False)` switches the fast path off.
"""

import copy
import os
import warnings
from collections.abc import Callable
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor, nn

from common.fast_kernels import run_net, run_vgg
from common.vgg16 import vgg_layers

PRIVATE = (  # names that torch may rename: if one is missing, the plain modules run
    "_C._functorch.peek_interpreter_stack",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "autograd.forward_ad._current_level",
    "nn.modules.module._has_any_global_hook",
    "cpu._is_avx512_bf16_supported",
    "cpu._is_amx_tile_supported",
    "ops.aten.threshold_backward.grad_input",
    "ops.aten.max_pool2d_with_indices_backward",
    "ops.mkldnn._is_mkldnn_bf16_supported",
    "ops.mkldnn._convolution_pointwise",
    "_C._nn.mkldnn_reorder_conv2d_weight",
)
BF16 = torch.bfloat16

_DEFAULT = False if os.environ.get("FAST_CPU") == "0" else None
_enabled: bool | None = _DEFAULT
_status: dict[str, str] = {}


def enable(value: bool | None) -> None:
    """False: never. None, the default: where it is faster, unless FAST_CPU=0 is set. True: in
    float32 and on any processor too, for tests and measurements."""
    global _enabled
    _enabled = _DEFAULT if value is None else value


def status() -> dict[str, str]:
    """For "cnn" and "vgg": "fast" if the last call ran the fast path, else the reason why not."""
    return dict(_status)


# --- conditions of the fast path --------------------------------------------------------------


def can_run_net(layers: nn.Module, images: Tensor) -> bool:
    """Whether `run_net` may replace `layers(images)`. layers: those of a ConvNet."""

    def usable() -> bool:
        return (
            _same(layers, "cnn")
            and _ordinary(images, *_tensors(layers))
            and images.dim() == 4
            and len(images) > 0
            and min(images.shape[2:]) > 4
        )

    return _decide("cnn", images, usable, lambda dtype: _check("cnn", dtype, _net_results))


def can_run_vgg(loss: nn.Module, output: Tensor, target: Tensor) -> bool:
    """Whether `run_vgg` may replace `loss.distances(output, target)`."""

    def usable() -> bool:
        frozen = [loss.mean, loss.std, *_tensors(loss.vgg)]
        return (
            _same(loss.vgg, "vgg")
            and _ordinary(output, target, *frozen)
            and not any(x.requires_grad or x.is_inference() for x in frozen)
            and len(output) > 0
        )

    check = lambda dtype: _check("vgg", dtype, lambda fast: _vgg_results(loss, fast))  # noqa: E731
    return _decide("vgg", output, usable, check)


def _decide(part: str, x: Tensor, usable: Callable, check: Callable) -> bool:
    """Evaluates the conditions, the cheapest first, and records the result in `_status`."""
    if torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if _enabled is False:
        answer = "switched off"
    elif x.device.type != "cpu":
        answer = f"not on {x.device.type}"
    elif dtype not in (BF16, torch.float32) or not (_enabled or dtype == BF16):
        answer = f"no gain in {str(dtype).removeprefix('torch.')}"
    elif lack := _missing():
        answer = lack
    elif not (_enabled or _native_bf16()):
        answer = "no gain without AVX512-BF16 or AMX"
    elif _observed() or not usable():
        answer = "hooks, changed layers, a transform or unusual inputs"
    else:
        answer = check(dtype) or "fast"
    _status[part] = answer
    return answer == "fast"


@cache
def _missing() -> str:
    for name in PRIVATE:
        try:
            attrgetter(name)(torch)
        except AttributeError:
            return _warn(f"torch {torch.__version__} has no torch.{name}")
    return ""


def _observed() -> bool:
    """Whether a transform, a mode, forward-mode differentiation or a global hook is active."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or nn.modules.module._has_any_global_hook()
    )


def _ordinary(*tensors: Tensor) -> bool:
    """Whether all are dense CPU tensors of one dtype and no subclass of Tensor or Parameter."""
    dtype = tensors[0].dtype
    return all(
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype is dtype
        for x in tensors
    )


def _tensors(layers: nn.Sequential) -> list[Tensor]:
    """The parameters and buffers, in a tenth of the time of layers.parameters()."""
    return [x for m in layers for x in (*m._parameters.values(), *m._buffers.values())]


def _same(layers: nn.Module, part: str) -> bool:
    """Whether each attribute of each layer, including its hooks, equals that of the original
    layers, except the values of the weights and the training mode."""
    reference = _reference(part)
    if type(layers) is not nn.Sequential or len(layers) != len(reference) - 1:
        return False
    pairs = zip([layers, *layers], reference, strict=True)
    return all(
        type(m) is kind and _attributes(m) == values and _shapes(m) == shapes
        for m, (kind, values, shapes) in pairs
    )


@cache
def _reference(part: str) -> list[tuple]:
    """The type, attributes and shapes that `_same` requires of each layer."""
    from common.models import ConvNet  # which imports this module

    with torch.device("meta"):
        layers = ConvNet().layers if part == "cnn" else vgg_layers()
    return [(type(m), _attributes(m), _shapes(m)) for m in (layers, *layers)]


def _attributes(module: nn.Module) -> dict:
    values = vars(module).copy()
    for key in ("training", "_modules", "_parameters", "_buffers"):
        del values[key]
    return values


def _shapes(module: nn.Module) -> list:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return [(name, x if x is None else x.shape) for name, x in tensors]


@cache
def _native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _warn(problem: str) -> str:
    if problem:
        warnings.warn(f"the plain modules run, which are slower: {problem}", stacklevel=6)
    return problem


_checked: dict[tuple, str] = {}


def _check(part: str, dtype: torch.dtype, results: Callable[[bool], list[Tensor]]) -> str:
    """Compares results(True), fast, with results(False), plain, once per part and dtype. Returns a
    description if they differ by more than rounding, else "". Independent of the caller's modes
    and random state."""
    if (part, dtype) not in _checked:
        problem, limit = "", 0.2 if dtype == BF16 else 1e-3
        autocast = torch.autocast("cpu", BF16, enabled=dtype == BF16)
        try:
            with torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
                with autocast:
                    pairs = zip(results(True), results(False), strict=True)
                for one, other in pairs:
                    error = ((one - other).norm() / other.norm()).item()
                    if not error < limit:
                        problem = f"the fast {part} differs from the plain one by {error:.2g}"
        except (RuntimeError, TypeError) as error:
            problem = f"the fast {part} fails: {str(error).splitlines()[0]}"
        _checked[part, dtype] = _warn(problem)
    return _checked[part, dtype]


def _net_results(fast: bool) -> list[Tensor]:
    from common.models import ConvNet

    torch.manual_seed(0)
    layers, images = ConvNet().layers.eval(), torch.rand(2, 3, 12, 12)
    output = (run_net(layers, images) if fast else layers(images)).float()
    return [output, *torch.autograd.grad(output.square().sum(), list(layers.parameters()))]


def _vgg_results(loss: nn.Module, fast: bool) -> list[Tensor]:
    loss = copy.copy(loss)
    loss.size = 32
    torch.manual_seed(0)
    output, target = torch.rand(2, 1, 8, 8).requires_grad_(), torch.rand(2, 1, 8, 8)
    values = run_vgg(loss, output, target) if fast else loss.distances(output, target)
    return [values, torch.autograd.grad(values.sum(), output)[0]]
