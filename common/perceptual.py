"""The report's perceptual loss (section 2.2): MSE plus the distances of five VGG16 feature maps.

The VGG is frozen, so the gradient with respect to the output is a fixed chain of the same
convolutions. It is worked out by hand beside the loss, a few images at a time: the maps then stay
in the processor's cache, the target's half costs one forward pass and leaves nothing behind.
"""

import socket
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights

from common import UserError

# torchvision's vgg16().features up to layer 28: the channels of the convolutions of each block.
# A max-pooling stands between the blocks; the last convolution of each is the one compared.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # their places in features
TERMS = ("mse", "vgg2", "vgg7", "vgg14", "vgg21", "vgg28")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel
GRAY_MEAN, GRAY_STD = 0.449, 0.226  # any gray scale would do, since the first layer undoes it
# Images a time: on a CPU few enough for the cache, on a GPU enough to fill it.
CHUNK = {"cpu": 2, "cuda": 128}


def _shapes() -> dict[str, tuple[int, ...]]:
    """The 26 keys of the convolutions in a torchvision VGG16 state dict, with their shapes."""
    shapes, inputs = {}, 3
    for places, channels in zip(CONVS, BLOCKS, strict=True):
        for place, outputs in zip(places, channels, strict=True):
            shapes[f"features.{place}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{place}.bias"] = (outputs,)
            inputs = outputs
    return shapes


def _download() -> Path:
    """torchvision's ImageNet weights from torch's cache folder, fetched where they are missing."""
    url = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.split("-")[1], progress=False)
        except (OSError, RuntimeError) as error:  # no network, no disk; a wrong hash
            raise UserError(
                f"cannot download {path.name} (528 MB) from {url}: {error}; put it into "
                f"{path.parent}, or name a file with --vgg-weights PATH (or random)"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    return path


def load_vgg16(weights: str | Path) -> dict[str, Tensor]:
    """The convolutions of a VGG16: 26 float32 tensors under torchvision's keys.

    weights: "imagenet" (torchvision's, downloaded once), "random" (always the same He
    initialisation, as torchvision's), or the path of a torchvision VGG16 state dict, whole or
    `features.*` only, of any float dtype. Raises UserError for any other file.
    """
    shapes = _shapes()
    if weights == "random":
        generator = torch.Generator().manual_seed(0)
        return {
            key: torch.randn(shape, generator=generator) * (2 / (9 * shape[0])) ** 0.5
            if len(shape) == 4
            else torch.zeros(shape)
            for key, shape in shapes.items()
        }
    path = _download() if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise UserError(f"VGG16 weights {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, by where the file breaks
        raise UserError(
            f"VGG16 weights {path}: not a whole PyTorch file of tensors only "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"VGG16 weights {path}: not a state dict (names to tensors)")
    classifier = {f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}
    found = state.keys() - classifier if classifier <= state.keys() else state.keys()
    for verb, keys in (("lacks", shapes.keys() - found), ("has the extra", found - shapes.keys())):
        if keys:
            raise UserError(
                f"VGG16 weights {path}: {verb} key {min(map(str, keys))} "
                f"({len(keys)} such), so not a torchvision VGG16 state dict"
            )
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape or not state[key].is_floating_point():
            raise UserError(
                f"VGG16 weights {path}: {key} is {tuple(state[key].shape)} {state[key].dtype}, "
                f"not {shape} of a float dtype"
            )
    state = {key: state[key].float() for key in shapes}
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"VGG16 weights {path}: {key} is not finite")
    return state


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pack(weight: Tensor) -> Tensor:
    """The weight as a 3x3 convolution likes it best. oneDNN would bring it into its own layout
    again at each call, which costs up to a seventh of the whole step on a CPU."""
    cpu, bf16 = weight.device.type == "cpu", weight.dtype == torch.bfloat16
    if not cpu or weight.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return _nhwc(weight)
    if bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _nhwc(weight)
    weight = weight.contiguous().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight, (1, 1), (1, 1), (1, 1), 1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """A 3x3 convolution with padding 1, its weight from _pack."""
    if not weight.is_mkldnn:
        x = F.conv2d(x, weight, bias, padding=1)
        return x.relu_() if relu else x
    how = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, (1, 1), (1, 1), (1, 1), 1, how, [], None
    )


class PerceptualLoss(nn.Module):
    """MSE(output, target) plus, for each l of the layers 2, 7, 14, 21, 28 of torchvision's
    vgg16().features, the mean over C, H, W of the squared difference of its outputs, averaged
    over the batch (section 2.2 of the report). The five are convolutions, taken before their ReLU.

    weights: see load_vgg16. size: the side, at least 32, to which the images are enlarged.
    After a call, `terms` holds the six terms, detached, by the names in TERMS. The VGG runs in
    bfloat16 under autocast, else in float32, on the output's device; it has no parameters and
    leaves nothing in a state dict. Raises UserError for a bad size or weights file.
    """

    def __init__(self, weights: str | Path, size: int = 224) -> None:
        super().__init__()
        if size < 32:
            raise UserError(f"the VGG halves its input four times: size {size} is below 32")
        self.size = size
        self.terms: dict[str, Tensor] = {}
        self._weights = load_vgg16(weights)
        self._prepared: tuple = (None, [])

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output, target: (N, 1, H, W) float, in [0, 1] but for what the net overshoots. Returns
        a scalar, float32 or float64 as the output, once differentiable with respect to it."""
        if output.shape != target.shape or output.dim() != 4 or output.shape[1] != 1:
            raise ValueError(
                f"need two (N, 1, H, W), not {tuple(output.shape)} and {tuple(target.shape)}"
            )
        kind = output.device.type
        exact = torch.promote_types(output.dtype, torch.float32)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(kind) else exact
        with torch.autocast(kind, enabled=False):
            if self._prepared[0] != (dtype, output.device):
                layers = _prepare(self._weights, dtype, output.device)
                self._prepared = (dtype, output.device), layers
            output, target = output.to(exact), target.detach().to(exact)
            mse = F.mse_loss(output, target)
            large = [
                (F.interpolate(x, size=self.size, mode="bilinear") - GRAY_MEAN) / GRAY_STD
                for x in (output, target)
            ]
            distance, terms = _Distance.apply(*large, self._prepared[1], dtype)
        self.terms = dict(zip(TERMS, (mse.detach(), *terms), strict=True))
        return mse + distance


def _prepare(weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> list[tuple]:
    """For each convolution its weight, its bias, and the weight of its gradient, which is a
    convolution too: channels swapped, kernel turned by 180 degrees."""
    layers = []
    for place in (place for block in CONVS for place in block):
        weight = weights[f"features.{place}.weight"]
        weight = weight.to(device, torch.promote_types(dtype, torch.float32))
        bias = weights[f"features.{place}.bias"].to(device, dtype)
        back = weight.transpose(0, 1).flip(2, 3)
        if place == 0:
            # The three channels differ by their normalisation only, so the layer is one of a gray
            # channel and of one that holds ones. Outside of the image both are zero, as the
            # normalised image is. A third holds what bfloat16 rounds off the gray: so near to
            # the image, eight bits would cost more accuracy than in all the layers above.
            mean, std = weight.new_tensor(MEAN), weight.new_tensor(STD)
            gray, ones = GRAY_STD / std, (GRAY_MEAN - mean) / std
            weight = torch.einsum("ocij,kc->okij", weight, torch.stack([gray, gray, ones]))
            layers.append((_pack(weight.to(dtype)), bias, weight[:, 0].flatten(1).to(dtype)))
        else:
            layers.append((_pack(weight.to(dtype)), bias, _pack(back.to(dtype))))
    return layers


def _distances(x: Tensor, layers: list, dtype: torch.dtype, need_grad: bool):
    """x: (2n, 1, S, S), n outputs and then their targets, gray and normalised. Returns the five
    distances (5,), each summed over the n images, and the gradient (n, 1, S, S) of their total
    with respect to the outputs, or None. Both have the dtype of x, the VGG runs in `dtype`."""
    n, shape, exact = len(x) // 2, x.shape[2:], x.dtype
    gray = x.to(dtype)
    x = _nhwc(torch.cat([gray, (x - gray).to(dtype), torch.ones_like(gray)], dim=1))
    terms, tape, difference = [], [], None
    compared = [place == block[-1] for block in CONVS for place in block]
    for (weight, bias, back), compare in zip(layers, compared, strict=True):
        pooled = None
        if difference is not None:
            # After the pooling, ReLU gives the same as before it, on a quarter of the pixels.
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            x.relu_()
            pooled = difference, indices[:n]
        source, difference = x[:n], None
        x = _conv(x, weight, bias, relu=not compare)
        if compare:
            difference = x[:n] - x[n:]
            # row by row: bfloat16 then rounds many norms a little, not one by a lot
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
        # in place: zero where the ReLU let nothing through
        torch.ops.aten.threshold_backward.grad_input(grad, source, 0, grad_input=grad)
        if pooled is not None:
            grad = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, pooled[0], (2, 2), (2, 2), (0, 0), (1, 1), False, pooled[1]
            )
    # The first layer leads back to one channel, which a convolution does badly: a matrix product
    # gives each pixel's 9 contributions, and fold adds them up.
    taps = grad.permute(0, 2, 3, 1).flatten(1, 2) @ tape[0][0]
    return terms, F.fold(taps.mT.to(exact), shape, 3, padding=1)


class _Distance(torch.autograd.Function):
    """The sum of the five terms, and the five without gradient, a few images at a time."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor, layers: list, dtype: torch.dtype):
        n, chunk, need_grad = len(output), CHUNK[output.device.type], ctx.needs_input_grad[0]
        pairs = zip(output.split(chunk), target.split(chunk), strict=True)
        parts = [_distances(torch.cat(pair), layers, dtype, need_grad) for pair in pairs]
        terms = torch.stack([terms for terms, _ in parts]).sum(0) / n
        if need_grad:
            ctx.save_for_backward(torch.cat([grad for _, grad in parts]) / n)
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        return grad * ctx.saved_tensors[0], None, None, None
