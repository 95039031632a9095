"""The report's perceptual loss (section 2.2):

    loss(y, t) = MSE(y, t) + sum over l of MSE(phi_l(y), phi_l(t)),    l = 2, 7, 14, 21, 28

phi_l is the output of layer l of torchvision's vgg16().features: a convolution, before its ReLU.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, fast_cpu
from common.vgg16 import vgg16_features

LAYERS = (2, 7, 14, 21, 28)


class PerceptualLoss(nn.Module):
    """The loss above. The VGG16 is frozen; the loss has no parameters and an empty state dict.

    weights: "imagenet", "random" or a path, see `vgg16.load_vgg16`. size: the side, at least 32,
    to which the images are enlarged for the VGG. Raises UserError for a bad size or file.
    After a call `terms` holds the six terms, detached: mse, vgg2, vgg7, vgg14, vgg21, vgg28.
    """

    def __init__(self, weights: str | Path, size: int = 224) -> None:
        super().__init__()
        if size < 32:
            raise UserError(f"the VGG halves its input four times: size {size} is below 32")
        self.size = size
        self.terms: dict[str, Tensor] = {}
        self.vgg = vgg16_features(weights)
        for name, value in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            buffer = torch.tensor(value).view(3, 1, 1)  # of ImageNet, per channel
            self.register_buffer(name, buffer, persistent=False)

    def features(self, gray: Tensor) -> list[Tensor]:
        """gray: (N, 1, H, W) in [0, 1]. Returns the five maps phi_l(gray), (N, C, h, w) each."""
        x = F.interpolate(gray, size=self.size, mode="bilinear").expand(-1, 3, -1, -1)
        x = (x - self.mean) / self.std
        maps = []
        for i, layer in enumerate(self.vgg):
            x = layer(x)
            if i in LAYERS:
                maps.append(x)
        return maps

    def distances(self, output: Tensor, target: Tensor) -> Tensor:
        """The five distances MSE(phi_l(output), phi_l(target)), shape (5,)."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(output), wanted, strict=True)
        # channels last, as the maps are in memory: mse_loss's gradient is contiguous in this order
        last = ((one.movedim(1, 3), other.movedim(1, 3)) for one, other in pairs)
        return torch.stack([F.mse_loss(one, other) for one, other in last])

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output, target: (N, 1, H, W) float; target in [0, 1], output not clamped. Returns
        a scalar, float64 for a float64 output, else float32. No gradient reaches the target.
        Raises ValueError for other shapes."""
        if output.shape != target.shape or output.dim() != 4 or output.shape[1] != 1:
            raise ValueError(
                f"need two (N, 1, H, W), not {tuple(output.shape)} and {tuple(target.shape)}"
            )
        dtype = torch.promote_types(output.dtype, torch.float32)  # autocast may give bfloat16
        output, target = output.to(dtype), target.detach().to(dtype)
        if (self.mean.dtype, self.mean.device) != (dtype, output.device):
            self.to(output.device, dtype)
        mse = F.mse_loss(output, target)
        if fast_cpu.can_run_vgg(self, output, target):
            distances = fast_cpu.run_vgg(self, output, target)
        else:
            distances = self.distances(output, target)
        terms = torch.cat([mse.detach()[None], distances.detach()])
        self.terms = dict(zip(("mse", *(f"vgg{i}" for i in LAYERS)), terms, strict=True))
        return mse + distances.sum()


def compiled(distances: Callable, **options) -> Callable:
    """`PerceptualLoss.distances` by torch.compile, in training steps of the largest batch so far.
    Smaller batches and calls without gradients run the plain formula: there are few, and each would
    be compiled anew for 10 to 20 s. options: of torch.compile. Where the compilation fails, all run
    the plain formula, after a warning."""
    fast = torch.compile(distances, dynamic=False, **options)
    size = 0

    def run(output: Tensor, target: Tensor) -> Tensor:
        nonlocal fast, size
        if fast is None or not torch.is_grad_enabled() or len(output) < size:
            return distances(output, target)
        try:
            if len(output) > size:  # compiles the backward too, which a step does out of sight
                size, probe = len(output), output.detach().requires_grad_()
                fast(probe, target).sum().backward()
            return fast(output, target)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it raises many types
            fast, reason = None, " ".join(str(error).splitlines()[:2])
        text = f"torch.compile failed, so the perceptual loss takes longer: {reason}"
        warnings.warn(text, stacklevel=2)
        return distances(output, target)

    return run
