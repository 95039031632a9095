"""The report's two nets, layer for layer, and a closed form of the first net's weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import fast_cpu
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
    rank-128 approximation is A followed by the projection on the principal directions V of the
    targets (PCA): the first layer is V^T A, the second s V. The sigmoid is nearly linear over the
    targets' range [0, 1]. The scalar s is the slope with the lowest error on the targets.
    """
    mean, directions = principal_directions(targets)
    first, second = model.layers[1], model.layers[2]
    identity = torch.eye(first.in_features, dtype=torch.float64).view(-1, 3, 32, 32)
    matrix = reference_transform(identity).flatten(1).to(targets.device)  # (3072, 784)
    some = targets[:5000].flatten(1)  # enough to fit one scalar
    projected = mean + (some - mean) @ directions @ directions.T

    def error(slope: float) -> float:
        return F.mse_loss(torch.sigmoid(slope * (projected - 0.5)), some.double()).item()

    slope = min((tenth / 10 for tenth in range(30, 70)), key=error)
    first.weight.copy_((matrix @ directions).T)
    first.bias.copy_(-directions.T @ mean)
    second.weight.copy_(slope * directions)
    second.bias.copy_(slope * (mean - 0.5))


class ConvNet(nn.Module):
    """The report's second model (section 2.1): four 4x4 convolutions, 64 channels wide, each
    reducing height and width by one pixel, ReLU after the first three and dropout after the second
    and third; 135,361 weights.

    The receptive field of an output pixel is 13x13, so flip="learned", the report's net, cannot
    learn to mirror an image. flip="fixed" mirrors the input first; the rest can be learned.
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
            nn.Dropout(0.2),
            nn.Conv2d(64, 64, 4, padding=1),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(64, 1, 4, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) float in [0, 1]. Returns (N, 1, H - 4, W - 4), not clamped."""
        if self.flip == "fixed":
            images = images.flip(2, 3)
        images = images.movedim(-3, -1).contiguous().movedim(-1, -3)  # channels last in memory
        if fast_cpu.can_run_net(self.layers, images):
            return fast_cpu.run_net(self.layers, images)
        return self.layers(images)
