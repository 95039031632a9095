"""The report's two nets, layer for layer, and the first one's closed form."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.metrics import principal_directions
from common.transforms import reference_transform


class FullyConnected(nn.Module):
    """The report's first model (section 1.1): 3072 -> 128 -> 784 and a sigmoid, 494,736 weights.

    No activation lies between the two linear layers: the net is an affine map of rank 128 into
    the logits of the output image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 128), nn.Linear(128, 28 * 28), nn.Sigmoid()
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, 32, 32) float in [0, 1]. Returns (N, 1, 28, 28) in [0, 1]."""
        return self.layers(images).unflatten(1, (1, 28, 28))


@torch.no_grad()
def closed_form_(model: FullyConnected, targets: Tensor) -> None:
    """Sets the weights to the best rank-128 map into the logits, without a gradient step.

    targets: (N, 1, 28, 28), the training targets. The transform is a matrix A, so its best
    rank-128 copy is A followed by the projection on the principal directions V of the targets:
    the first layer is V^T A, the second s V. The sigmoid is nearly straight over [0, 1], where
    targets lie: s, one number, is the slope that fits it to the targets best.
    """
    mean, directions = principal_directions(targets)
    first, second = model.layers[1], model.layers[2]
    identity = torch.eye(first.in_features, dtype=torch.float64).view(-1, 3, 32, 32)
    matrix = reference_transform(identity).flatten(1).to(targets.device)  # (3072, 784)
    some = targets[:5000].flatten(1)  # enough for the one number
    projected = mean + (some - mean) @ directions @ directions.T

    def error(slope: float) -> float:
        return F.mse_loss(torch.sigmoid(slope * (projected - 0.5)), some.double()).item()

    slope = min((tenth / 10 for tenth in range(30, 70)), key=error)
    first.weight.copy_((matrix @ directions).T)
    first.bias.copy_(-directions.T @ mean)
    second.weight.copy_(slope * directions)
    second.bias.copy_(slope * (mean - 0.5))


DROPOUT = 0.2
# A mask takes 16 random bits a pixel. Read as a bfloat16 they are at most this number in 13107 of
# 65536 cases (0.199997), NaNs counted as above, and torch's own backward pass of ReLU then is the
# one vectorised kernel that compares and selects in a single pass over memory.
DROP_AT_MOST = float(torch.tensor(0xCC4E - 65536, dtype=torch.int16).view(torch.bfloat16))


def _random_bits(like: Tensor) -> Tensor:
    """Independent random bfloat16 bit patterns in the shape and memory order of `like`, a
    channels_last CPU tensor. torch's generator gives the seed, so its state decides the bits;
    numpy's draws eight bytes faster than torch's draws one number for `bernoulli_`."""
    n, c, h, w = like.shape
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4)
    bits = torch.from_numpy(words).view(torch.bfloat16)[: like.numel()]
    return bits.view(n, h, w, c).permute(0, 3, 1, 2)


class _ReLUDropout(torch.autograd.Function):
    """In place max(x, 0), then, if drop, zero with probability DROPOUT, without the factor
    1 / (1 - DROPOUT). What was dropped is zero like what was below zero, so the backward pass is
    that of ReLU alone and needs no mask."""

    @staticmethod
    def forward(ctx, x: Tensor, drop: bool) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_min_(0)
        if drop:
            bits = _random_bits(x).to(x.dtype)
            torch.ops.aten.threshold_backward.grad_input(x, bits, DROP_AT_MOST, grad_input=x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        # In place: the convolution above made this gradient for us alone, and fresh memory costs
        # more than the arithmetic.
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad), None


class ConvNet(nn.Module):
    """The report's second model (section 2.1): four 4x4 convolutions, 64 channels wide, each
    taking a pixel off height and width, ReLU after the first three and dropout after the second
    and third; 135,361 weights.

    An output pixel sees 13x13 input pixels, so flip="learned", the report's net, cannot learn to
    mirror an image; flip="fixed" turns the input around first and leaves the rest to learn.
    """

    def __init__(self, flip: str = "learned") -> None:
        super().__init__()
        if flip not in ("learned", "fixed"):
            raise ValueError(f"flip must be 'learned' or 'fixed', not {flip!r}")
        self.flip = flip
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 4, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 4, padding=1),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Conv2d(64, 64, 4, padding=1),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Conv2d(64, 1, 4, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) float in [0, 1]. Returns (N, 1, H - 4, W - 4), not clamped."""
        if self.flip == "fixed":
            images = images.flip(2, 3)
        images = images.contiguous(memory_format=torch.channels_last)
        if images.device.type != "cpu":
            return self.layers(images)
        # The same layers, cheaper on a CPU: see _ReLUDropout. Dropout's factor moves into the
        # next layer's few weights.
        first, second, third, fourth = (m for m in self.layers if isinstance(m, nn.Conv2d))
        scale = 1 / (1 - DROPOUT) if self.training else 1.0
        x = _ReLUDropout.apply(first(images), False)
        x = _ReLUDropout.apply(second(x), self.training)
        x = F.conv2d(x, third.weight * scale, third.bias, padding=1)
        x = _ReLUDropout.apply(x, self.training)
        # With one output channel a convolution leaves most of the vector units idle. As a matrix
        # product it gives every input pixel's 16 contributions, which fold adds up in float32.
        taps = fourth.weight[0].flatten(1).flip(1) * scale
        taps = x.permute(0, 2, 3, 1).flatten(1, 2) @ taps.to(x.dtype)
        size = (x.shape[2] - 1, x.shape[3] - 1)
        return F.fold(taps.mT.to(fourth.weight.dtype), size, 4, padding=2) + fourth.bias
