"""The report's two nets, layer for layer, two linear models that can equal the chain, and the
closed forms: weights from images or from the chain itself, without a gradient step."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import UserError, fast_cpu
from common.metrics import principal_directions
from common.transforms import reference_transform


class FullyConnected(nn.Module):
    """The report's first model (section 1.1): 3072 -> 128 -> 784 and a sigmoid, 494,480 weights.

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
def closed_form_(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Sets the weights without a gradient step: of a FullyConnected from the training targets and
    the chain's matrix, of a Linear to that matrix, of a Separable from the first 16 pairs alone.

    images: (N, 3, 32, 32), uint8 in [0, 255] or float in [0, 1]; targets: (N, 1, 28, 28). Raises
    UserError where the pairs do not suffice.
    """
    if isinstance(model, FullyConnected):
        _fully_connected_closed_form_(model, targets)
    elif isinstance(model, Linear):
        model.layers[1].weight.copy_(chain_matrix().T)
        model.layers[1].bias.zero_()
    else:
        separable_closed_form_(model, images, targets)


def _fully_connected_closed_form_(model: FullyConnected, targets: Tensor) -> None:
    """The best rank-128 map into the logits.

    targets: (N, 1, 28, 28), the training targets. The transform is a matrix A, so its best
    rank-128 copy is A followed by the projection on the principal directions V of the targets:
    the first layer is V^T A, the second s V. The sigmoid is nearly straight over [0, 1], where
    targets lie: s, one number, is the slope that fits it to the targets best.
    """
    mean, directions = principal_directions(targets)
    first, second = model.layers[1], model.layers[2]
    matrix = chain_matrix().to(targets.device)
    some = targets[:5000].flatten(1)  # enough for the one number
    projected = mean + (some - mean) @ directions @ directions.T

    def error(slope: float) -> float:
        return F.mse_loss(torch.sigmoid(slope * (projected - 0.5)), some.double()).item()

    slope = min((tenth / 10 for tenth in range(30, 70)), key=error)
    first.weight.copy_((matrix @ directions).T)
    first.bias.copy_(-directions.T @ mean)
    second.weight.copy_(slope * directions)
    second.bias.copy_(slope * (mean - 0.5))


class Linear(nn.Module):
    """One linear layer, 3072 -> 784: 2,409,232 weights. Every affine map of the image is such a
    layer, so the chain is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 28 * 28))

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, 32, 32) float in [0, 1]. Returns (N, 1, 28, 28), not clamped."""
        return self.layers(images).unflatten(1, (1, 28, 28))


class Separable(nn.Module):
    """rows @ (sum over c of mix[c] * image[c]) @ columns^T: 3 + 28 * 32 + 28 * 32 = 1,795 weights.

    The chain has this form: a grayscale is a weighted sum of the channels, and a resize and a flip
    act on rows and on columns separately. The factors can be scaled against each other, so two of
    the weights are redundant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((1, 3), 1 / 3))  # a matrix: torch.optim.Muon wants one
        self.rows = nn.Parameter(nn.init.orthogonal_(torch.empty(28, 32)))
        self.columns = nn.Parameter(nn.init.orthogonal_(torch.empty(28, 32)))

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, 32, 32) float. Returns (N, 1, 28, 28), not clamped."""
        red, green, blue = images.unbind(1)
        r, g, b = self.mix[0]
        gray = red * r + green * g + blue * b
        rows = self.rows.expand(len(gray), -1, -1)  # torch.matmul would copy gray, for the gradient
        return (rows @ gray @ self.columns.mT).unsqueeze(1)


def chain_matrix() -> Tensor:
    """The chain as a matrix, (3072, 784) float64: flattened images @ matrix = flattened targets."""
    pixels = torch.eye(3 * 32 * 32, dtype=torch.float64).view(-1, 3, 32, 32)
    return reference_transform(pixels).flatten(1)


ALS_IMAGES = 16  # enough in every trial, 12 in most: the ladder in results/README.md
ALS_AT_LEAST = 12


@torch.no_grad()
def separable_closed_form_(model: Separable, images: Tensor, targets: Tensor) -> None:
    """Fits the weights to the first 16 images by alternating least squares in float64: each factor
    in turn is the least-squares solution for the other two.

    images: (N, 3, 32, 32), uint8 in [0, 255] or float in [0, 1]; targets: (N, 1, 28, 28).
    From random factors the iteration can rest far from the solution for hundreds of rounds. It
    starts from the largest singular pair of the correlation between targets and images, a matrix
    over (row of target, row of image) and (column of target, column of image); for white noise the
    pair would be the factors themselves. Raises UserError for fewer than 12 images, for images that
    are not finite, and where the images do not determine the factors.
    """
    if len(images) < ALS_AT_LEAST:
        raise UserError(
            f"the closed form of Separable needs {ALS_AT_LEAST} training images, better "
            f"{ALS_IMAGES}, not {len(images)}"
        )
    scale = 255 if images.dtype == torch.uint8 else 1
    x = images[:ALS_IMAGES].to("cpu", torch.float64) / scale
    y = targets[:ALS_IMAGES, 0].to("cpu", torch.float64)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("the closed form of Separable needs finite images")

    mix = torch.full((3,), 1 / 3, dtype=torch.float64)
    columns = torch.randn(28, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gray = x.mean(1)
    gray, target = (z - z.mean((1, 2), keepdim=True) for z in (gray, y))
    for _ in range(30):  # power iteration
        rows = (target @ columns @ gray.mT).sum(0)
        columns = F.normalize((target.mT @ rows @ gray).sum(0), dim=(0, 1))

    error = math.inf
    for _ in range(2000):
        gray = torch.einsum("c,nchw->nhw", mix, x)
        rows = _least_squares((columns @ gray.mT).flatten(0, 1), y.mT.flatten(0, 1)).T
        columns = _least_squares((rows @ gray).flatten(0, 1), y.flatten(0, 1)).T
        channels = (rows @ x @ columns.mT).transpose(0, 1).flatten(1).T
        mix = _least_squares(channels, y.flatten()[:, None])[:, 0]
        last, error = error, (channels @ mix - y.flatten()).square().mean().sqrt().item()
        if error >= last:  # it falls until rounding rules
            break
    if not error < 1e-6:
        raise UserError(
            f"alternating least squares stalls at an error of {error:.1g} on {len(x)} images: "
            f"it needs {ALS_IMAGES} images that differ"
        )
    # the scales are free: mix sums to 1, and so does a row of `rows` on average
    columns, mix = columns * mix.sum(), mix / mix.sum()
    gain = rows.sum(1).mean()
    model.mix.copy_(mix[None])
    model.rows.copy_(rows / gain)
    model.columns.copy_(columns * gain)


def _least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The X of least |inputs @ X - outputs|. Raises UserError where there is more than one."""
    solution, _, rank, _ = torch.linalg.lstsq(inputs, outputs, driver="gelsy")
    if rank < inputs.shape[1]:
        raise UserError("the images do not determine the factors of Separable: are they all gray?")
    return solution


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
