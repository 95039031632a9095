"""The report's two nets, layer for layer, and the first one's closed form."""

from torch import Tensor, nn


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
