"""The kernels of `fast_cpu`: the CNN and the five VGG distances with private torch operators and
hand-written backward passes. The plain formulas are in models.py and perceptual.py."""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
BF16 = torch.bfloat16


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# --- the CNN -----------------------------------------------------------------------------------

# A mask takes 16 random bits per pixel. Read as bfloat16, 13107 of 65536 patterns (0.199997) are at
# most this number; NaNs count as larger. torch's backward kernel of ReLU compares and selects in
# a single vectorised pass over memory, so it applies the mask.
DROP_AT_MOST = float(torch.tensor(0xCC4E - 65536, dtype=torch.int16).view(BF16))


def random_bits(like: Tensor) -> Tensor:
    """Independent random bfloat16 bit patterns in the shape and memory order of `like`, a
    channels_last CPU tensor. torch's generator gives the seed, so its state determines the bits;
    numpy draws eight bytes faster than torch draws one number for `bernoulli_`."""
    n, c, h, w = like.shape
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4)
    bits = torch.from_numpy(words).view(BF16)[: like.numel()]
    return bits.view(n, h, w, c).permute(0, 3, 1, 2)


class _ReLUDropout(torch.autograd.Function):
    """In place: ReLU, then, if drop, dropout with probability 0.2 but without the factor 1 / 0.8.
    Dropped elements are zero like negative inputs, so the backward pass is that of ReLU and needs
    no mask."""

    @staticmethod
    def forward(ctx, x: Tensor, drop: bool) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_min_(0)
        if drop:
            bits = random_bits(x).to(x.dtype)
            aten.threshold_backward.grad_input(x, bits, DROP_AT_MOST, grad_input=x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative may follow
            return aten.threshold_backward(grad, x, 0), None
        # In place: the next layer's backward pass created this gradient only for this node, and
        # allocating memory costs more than the arithmetic.
        return aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad), None


def run_net(layers: nn.Sequential, images: Tensor) -> Tensor:
    """Computes `layers(images)`. layers: those of a ConvNet. images: channels_last. Dropout's
    factor 1 / 0.8 is applied to the weights of the next layer: fewer than activations."""
    first, _, second, _, drop1, third, _, drop2, fourth = layers
    scale1, scale2 = (1 / (1 - 0.2) if drop.training else 1.0 for drop in (drop1, drop2))
    x = _ReLUDropout.apply(first(images), False)
    x = _ReLUDropout.apply(second(x), drop1.training)
    x = F.conv2d(x, third.weight * scale1, third.bias, padding=1)
    x = _ReLUDropout.apply(x, drop2.training)
    # A convolution with one output channel uses little of the vector width. A matrix product
    # computes the 16 contributions of each input pixel, and fold sums them in float32.
    taps = fourth.weight[0].flatten(1).flip(1) * scale2
    taps = x.permute(0, 2, 3, 1).flatten(1, 2) @ taps.to(x.dtype)
    size = (x.shape[2] - 1, x.shape[3] - 1)
    return (F.fold(taps.mT.float(), size, 4, padding=2) + fourth.bias).to(x.dtype)


# --- the distances of the perceptual loss ------------------------------------------------------

GRAY_MEAN, GRAY_STD = 0.449, 0.226  # any scale works: the first layer's weights undo it
CHUNK = 2  # images at a time: few enough for the maps to fit in the cache
_cache: WeakKeyDictionary = WeakKeyDictionary()  # vgg -> key of its weights, packed weights


def run_vgg(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """`loss.distances(output, target)`, shape (5,)."""
    dtype = BF16 if torch.is_autocast_enabled("cpu") else output.dtype
    need_grad = output.requires_grad and torch.is_grad_enabled()
    with torch.autocast("cpu", enabled=False):
        return _Distances.apply(output, target, loss, dtype, need_grad)


class _Distances(torch.autograd.Function):
    """The VGG is frozen, so the gradient of the distances' sum needs only the input gradients of
    its layers. The forward pass computes it too, a few images at a time."""

    @staticmethod
    def forward(ctx, output, target, loss, dtype, need_grad):
        layers = _packed(loss, dtype)
        with torch.enable_grad():
            output_leaf = output.detach().requires_grad_(need_grad)
            large = [
                (F.interpolate(x, size=loss.size, mode="bilinear") - GRAY_MEAN) / GRAY_STD
                for x in (output_leaf, target)
            ]
        pairs = zip(*(x.detach().split(CHUNK) for x in large), strict=True)
        parts = [_distances(torch.cat(pair), layers, dtype, need_grad) for pair in pairs]
        if need_grad:
            grad = torch.cat([grad for _, grad in parts]) / len(output)
            (grad,) = torch.autograd.grad(large[0], output_leaf, grad)
            ctx.save_for_backward(output, target, grad)
            ctx.loss, ctx.dtype = loss, dtype
        return torch.stack([terms for terms, _ in parts]).sum(0) / len(output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        output, target, grad_of_sum = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if not create_graph and bool((grad == grad[0]).all()):
            return grad[0] * grad_of_sum, None, None, None, None
        # A second derivative may follow, or the distances were not summed: the plain formula.
        with torch.enable_grad(), torch.autocast("cpu", BF16, enabled=ctx.dtype == BF16):
            distances = ctx.loss.distances(output, target)
        (grad,) = torch.autograd.grad(distances, output, grad, create_graph=create_graph)
        return grad, None, None, None, None


def _packed(loss: nn.Module, dtype: torch.dtype) -> list[tuple]:
    """For each convolution: whether a pooling layer precedes it, whether its output is compared,
    its weight, its bias, and the weight of its input gradient, a convolution with channels swapped
    and the kernel rotated by 180 degrees. Cached until a weight changes."""
    tensors = [loss.mean, loss.std, *loss.vgg.buffers()]
    key = dtype, loss.size, [(x.data_ptr(), x._version) for x in tensors]
    if loss.vgg in _cache and _cache[loss.vgg][0] == key:
        return _cache[loss.vgg][1]
    layers, side = [], loss.size
    for place, layer in enumerate(loss.vgg):
        if isinstance(layer, nn.MaxPool2d):
            side //= 2
        if not isinstance(layer, nn.Conv2d):
            continue
        after_pool = place > 0 and isinstance(loss.vgg[place - 1], nn.MaxPool2d)
        weight, compare = layer.weight, place in (2, 7, 14, 21, 28)
        back = weight.transpose(0, 1).flip(2, 3)
        if place == 0:
            # The three channels differ only in their normalisation, so the input reduces to a gray
            # channel and a channel of ones. Both have zero padding, like the normalised image. A
            # third channel holds the rounding error of the gray channel in bfloat16: rounding the
            # input to eight bits would cost more accuracy than all the layers after it.
            mean, std = loss.mean.flatten(), loss.std.flatten()
            gray, ones = GRAY_STD / std, (GRAY_MEAN - mean) / std
            weight = torch.einsum("ocij,kc->okij", weight, torch.stack([gray, gray, ones]))
            back = weight[:, 0].flatten(1).to(dtype)
        else:
            back = _pack(back.to(dtype), CHUNK, side)
        weight = _pack(weight.to(dtype), 2 * CHUNK, side)
        layers.append((after_pool, compare, weight, layer.bias.to(dtype), back))
    _cache[loss.vgg] = key, layers
    return layers


def _pack(weight: Tensor, n: int, side: int) -> Tensor:
    """The weight in the layout that oneDNN's 3x3 convolution of n images with this side uses.
    Otherwise oneDNN reorders the weight at each call, which takes up to a seventh of a step."""
    native = weight.dtype == torch.float32 or (
        weight.dtype == BF16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not native or not torch.backends.mkldnn.is_available():
        return _nhwc(weight)
    weight, one = weight.contiguous().to_mkldnn(), (1, 1)
    shape = (n, weight.shape[1], side, side)
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight, one, one, one, 1, shape)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """A 3x3 convolution with padding 1, its weight from _pack."""
    if not weight.is_mkldnn:
        x = F.conv2d(x, weight, bias, padding=1)
        return x.relu_() if relu else x
    how, one = "relu" if relu else "none", (1, 1)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, one, one, one, 1, how, [], None)


def _distances(x: Tensor, layers: list[tuple], dtype: torch.dtype, need_grad: bool):
    """x: (2n, 1, S, S), n outputs and then their targets, gray and normalised. Returns the five
    distances (5,), each summed over the n images, and the gradient (n, 1, S, S) of their total
    with respect to the outputs, or None. Both have the dtype of x; the VGG runs in `dtype`."""
    n, shape, exact = len(x) // 2, x.shape[2:], x.dtype
    gray = x.to(dtype)
    x = _nhwc(torch.cat([gray, (x - gray).to(dtype), torch.ones_like(gray)], dim=1))
    terms, tape, difference = [], [], None
    for after_pool, compare, weight, bias, back in layers:
        pooled = None
        if after_pool:
            # ReLU commutes with max pooling; after it there are a quarter of the pixels.
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            x.relu_()
            pooled = difference, indices[:n]
        source, difference = x[:n], None
        x = _conv(x, weight, bias, relu=not compare)
        if compare:
            difference = x[:n] - x[n:]
            # a norm per row: the rounding errors of many bfloat16 norms average out
            norms = torch.linalg.vector_norm(difference.permute(0, 2, 3, 1).flatten(2), dim=2)
            terms.append(norms.to(exact).square().sum() / difference[0].numel())
        tape.append((back, source, pooled, difference))
    terms = torch.stack(terms)
    if not need_grad:
        return terms, None
    grad = None
    for back, source, pooled, difference in reversed(tape[1:]):
        if difference is not None:
            factor = 2 / difference[0].numel()
            grad = difference * factor if grad is None else grad.add_(difference, alpha=factor)
        grad = _conv(grad, back)
        # in place: the backward pass of ReLU
        aten.threshold_backward.grad_input(grad, source, 0, grad_input=grad)
        if pooled is not None:
            grad = aten.max_pool2d_with_indices_backward(
                grad, pooled[0], (2, 2), (2, 2), (0, 0), (1, 1), False, pooled[1]
            )
    # The gradient of the first layer has one channel, for which a convolution is slow: a matrix
    # product computes the 9 contributions of each pixel, and fold sums them.
    taps = grad.permute(0, 2, 3, 1).flatten(1, 2) @ tape[0][0]
    return terms, F.fold(taps.mT.to(exact), shape, 3, padding=1)
