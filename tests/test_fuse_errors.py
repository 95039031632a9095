"""What fuse refuses: a clear error that names the step and the reason."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchvision import models, tv_tensors
from torchvision import transforms as v1
from torchvision.transforms import v2

from common.fused import FusedTransform, NotFusable, fuse
from tests.chains import MEAN, STD, images, pil, training


@dataclass
class Callable:  # compared by its fields, so without a hash
    p: float = 0.5

    def __call__(self, x):
        return x


class Doubled(v2.Compose):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([v2.Resize(8), v2.ColorJitter(0.5)], "step 1, ColorJitter.*not linear"),
        (v2.RandomApply([v2.Resize(8)]), "step 0, RandomApply.*chooses"),
        ([v2.Lambda(abs)], "step 0, Lambda.*nothing is known"),
        ([v2.Resize(8), [abs]], "step 1, abs"),
        (v2.RandomRotation(10), "not separable"),
        (v2.Resize(8, interpolation="nearest"), "step 0, Resize.*bilinear or bicubic"),
        (v2.GaussianBlur(3, (0.1, 2.0)), "step 0, GaussianBlur.*one number"),
        (v2.ToDtype(torch.int64), "step 0, ToDtype"),
        (v1.Resize(8), "v1: use torchvision.transforms.v2"),
        (nn.Conv2d(3, 3, 1), "step 0, Conv2d"),
        (models.video.R3D_18_Weights.DEFAULT.transforms(), "step 0, VideoClassification"),
        (v2.Normalize(MEAN, (1, 0, 1)), "division by zero"),
        ([v2.Resize(8), Callable()], "step 1, Callable"),
        (Doubled([v2.Resize(8)]), "step 0, Doubled"),
        ([Halved(v2.Resize(8))], "step 0, Halved"),
    ],
    ids=str,
)
def test_what_cannot_be_fused(chain, reason):
    with pytest.raises(NotFusable, match=reason):
        fuse(chain)


BAD = [
    (v2.Resize(8), images(3, 0, 9), ValueError, "none of them 0"),
    (v2.Resize(8), torch.zeros(9, 9), ValueError, r"\(\.\.\., C, H, W\)"),
    (v2.Resize(8), images(3, 9, 9).short(), TypeError, "uint8 or float, not torch.int16"),
    (v2.Resize(8), images(3, 9, 9).bool(), TypeError, "uint8 or float, not torch.bool"),
    (v2.Resize((0, 8)), images(3, 9, 9), ValueError, "step 0, Resize.*positive"),
    (v2.RandomCrop(10), images(3, 9, 9), ValueError, "RandomCrop.*larger than"),
    (v2.GaussianBlur(9, 1.0), images(3, 4, 9), ValueError, "GaussianBlur.*more than 4"),
    (v2.Normalize(MEAN, STD), images(3, 9, 9), TypeError, "Normalize.*uint8.*ToDtype"),
    (v2.Normalize(MEAN, STD), images(3, 9, 9, dtype=torch.float32)[:1], ValueError, "1 channels"),
    (v2.Normalize(MEAN[:2], STD[:2]), torch.rand(3, 9, 9), ValueError, "length 2, but 3 channels"),
    (v2.Normalize(MEAN, STD), pil(), TypeError, "Normalize.*PIL"),
    (v2.Normalize(MEAN, (1, 1e-9, 1)), torch.rand(3, 9, 9).half(), ValueError, "zero in torch.fl"),
    (v2.RandomCrop(9, 1, fill=float("nan")), torch.rand(3, 9, 9), ValueError, "must be finite"),
    (v2.Grayscale(), images(2, 9, 9), ValueError, "Grayscale.*2 channels"),
    (v2.Grayscale(), tv_tensors.Video(images(2, 3, 9, 9)), TypeError, "leaves a Video as it is"),
    (FusedTransform(), images(1, 9, 9), TypeError, "three channels"),
    (v2.ToDtype(torch.uint8, scale=True), torch.rand(3, 9, 9), NotFusable, "truncates"),
    (v2.Resize(8), [images(3, 9, 9), images(3, 8, 9)], TypeError, "stack them"),
    (
        training(),
        [tv_tensors.Image(images(3, 9, 9)), tv_tensors.Image(images(3, 8, 9))],
        ValueError,
        "agree in number and size",
    ),
    (v2.Resize(8), pil().convert("RGBA"), TypeError, "RGB or L, not RGBA"),
    (v2.Resize(8), ("a", 3), TypeError, "no image"),
    (v2.Resize(8), (images(3, 9, 9), tv_tensors.Mask(images(9, 9))), TypeError, "Mask"),
]


@pytest.mark.parametrize(("chain", "sample", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_a_clear_error(chain, sample, error, message):
    with pytest.raises(error, match=message):
        fuse(chain)(sample)
