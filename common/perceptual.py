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


class PerceptualLoss(nn.Module):
    """MSE(output, target) plus, for each l of the layers 2, 7, 14, 21, 28 of torchvision's
    vgg16().features, the mean over C, H, W of the squared difference of its outputs, averaged
    over the batch (section 2.2 of the report). The five are convolutions, taken before their ReLU.

    weights: see load_vgg16. size: the side, at least 32, to which the images are enlarged.
    After a call, `parts` holds the six terms, detached, by the names in TERMS. The VGG runs in
    bfloat16 under autocast, else in float32; it is not part of any state dict.
    Raises UserError for a bad size or weights file.
    """

    def __init__(self, weights: str | Path, size: int = 224) -> None:
        super().__init__()
        if size < 32:
            raise UserError(f"the VGG halves its input four times: size {size} is below 32")
        self.size = size
        self.parts: dict[str, Tensor] = {}
        self._prepared: dict[tuple[torch.dtype, torch.device], list] = {}
        state = load_vgg16(weights)
        for key, value in state.items():
            self.register_buffer(key.replace(".", "_"), value, persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output, target: (N, 1, H, W) float in [0, 1] (the output may stray). Returns a float32
        scalar, differentiable once, with respect to the output."""
        device = output.device.type
        dtype = torch.promote_types(output.dtype, torch.float32)
        output, target = output.to(dtype), target.detach().to(dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.bfloat16
        with torch.autocast(device, enabled=False):
            mse = F.mse_loss(output, target)
            total, terms = _Distances.apply(
                self._enlarge(output), self._enlarge(target), self, dtype
            )
            self.parts = dict(zip(TERMS, (mse.detach(), *terms), strict=True))
            return mse + total

    def _enlarge(self, images: Tensor) -> Tensor:
        return (F.interpolate(images, size=self.size, mode="bilinear") - GRAY_MEAN) / GRAY_STD

    def _layers(self, dtype: torch.dtype, device: torch.device) -> list[list[tuple]]:
        """Per block and convolution: weight and bias forward, and the weight of its gradient,
        which is a convolution too: channels swapped, kernel turned by 180 degrees. Cast once."""
        if (dtype, device) in self._prepared:
            return self._prepared[dtype, device]
        blocks = []
        for places in CONVS:
            blocks.append([])
            for place in places:
                weight = getattr(self, f"features_{place}_weight")
                bias = getattr(self, f"features_{place}_bias")
                back = weight.transpose(0, 1).flip(2, 3)
                if place == 0:
                    # All three channels carry the same gray value, so one is enough; a second, of
                    # ones, carries what the three normalisations add. Both are padded with zeros
                    # as the normalised image is, so the border comes out right too.
                    mean, std = weight.new_tensor(MEAN), weight.new_tensor(STD)
                    scale = torch.stack([GRAY_STD / std, (GRAY_MEAN - mean) / std])
                    weight = torch.einsum("ocij,kc->okij", weight, scale)
                    back = weight[:, 0].flatten(1)  # (64, 9), see _backward
                blocks[-1].append(
                    tuple(
                        _nhwc(w) if w.dim() == 4 else w
                        for w in map(lambda w: w.to(dtype), (weight, bias, back))
                    )
                )
        self._prepared = {(dtype, device): blocks}
        return blocks

    def distances(self, x: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
        """x: (2n, 1, size, size), n outputs and their n targets, gray and normalised. Returns the
        sums over the n images of the five terms, and the gradient of their sum with respect to
        the outputs (n, 1, size, size), float32, or None."""
        n, size = len(x) // 2, x.shape[2:]
        exact = torch.promote_types(x.dtype, torch.float32)
        blocks = self._layers(x.dtype, x.device)
        x = _nhwc(torch.cat([x, torch.ones_like(x)], dim=1))
        terms, tape = [], []
        for i, block in enumerate(blocks):
            inputs = []
            for j, (weight, bias, _) in enumerate(block):
                inputs.append(x[:n])
                x = F.conv2d(x, weight, bias, padding=1)
                if j < len(block) - 1:
                    x.relu_()
            difference = x[:n] - x[n:]
            # by rows, so that bfloat16 rounds many sums a little and not one sum a lot
            rows = difference.permute(0, 2, 3, 1).flatten(2)
            count = difference[0].numel()
            norms = torch.linalg.vector_norm(rows, dim=2)
            terms.append(norms.to(exact).square().sum() / count)
            places = None
            if i < len(blocks) - 1:
                # ReLU after the pooling gives what it gives before, on a quarter of the pixels
                x, places = F.max_pool2d(x, 2, return_indices=True)
                x.relu_()
                places = places[:n]
            tape.append((block, inputs, difference, 2 / count, places))
        terms = torch.stack(terms)
        return terms, self._backward(tape, size) if need_grad else None

    @staticmethod
    def _backward(tape: list[tuple], size: torch.Size) -> Tensor:
        grad = None
        for block, inputs, difference, factor, places in reversed(tape):
            if grad is None:
                grad = difference.mul_(factor)
            else:
                grad = torch.ops.aten.max_pool2d_with_indices_backward(
                    grad, difference, [2, 2], [2, 2], [0, 0], [1, 1], False, places
                ).add_(difference, alpha=factor)
            for (_, _, back), x in zip(reversed(block), reversed(inputs), strict=True):
                if back.dim() == 2:  # the first layer: one channel is left of 64
                    taps = grad.permute(0, 2, 3, 1).flatten(1, 2) @ back
                    return F.fold(
                        taps.mT.to(torch.promote_types(taps.dtype, torch.float32)),
                        size,
                        3,
                        padding=1,
                    )
                grad = F.conv2d(grad, back, padding=1)
                # where the ReLU before this convolution let nothing through
                torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
        raise AssertionError("unreachable: the first layer returns")


class _Distances(torch.autograd.Function):
    """The five terms' sum, and the terms themselves without gradient."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor, loss: PerceptualLoss, dtype: torch.dtype):
        chunk = CHUNK[output.device.type]
        terms, grads = 0, []
        for x, y in zip(output.to(dtype).split(chunk), target.to(dtype).split(chunk), strict=True):
            part, grad = loss.distances(torch.cat([x, y]), ctx.needs_input_grad[0])
            terms = terms + part
            grads.append(grad)
        terms = terms / len(output)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) / len(output))
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        (saved,) = ctx.saved_tensors
        return grad * saved, None, None, None
