"""The two nets that can be the chain exactly: Linear and Separable, and their closed forms."""

import pytest
import torch
from torch import nn

from common import UserError
from common.data import synthetic, to_float
from common.models import ALS_AT_LEAST, ALS_IMAGES, Linear, Separable, closed_form_
from common.transforms import GRAY_WEIGHTS, _resize_matrix, reference_transform

# A pixel of the output is a weighted mean of 3 * 32 * 32 values in [0, 1] of which at most
# 3 * 3 * 3 count. Each of a few dozen float32 operations rounds by at most 2^-24 of a value below
# 1, and the filter's own weights are rounded likewise, on both sides of the comparison.
ROUNDING = 32 * 2**-24


def test_parameters():
    assert sum(p.numel() for p in Separable().parameters()) == 1795
    assert sum(p.numel() for p in Linear().parameters()) == 2_409_232


@pytest.mark.parametrize("net", [Linear, Separable])
def test_output_has_the_shape_of_the_chain(net):
    assert net()(torch.rand(2, 3, 32, 32)).shape == (2, 1, 28, 28)
    assert net()(torch.rand(0, 3, 32, 32)).shape == (0, 1, 28, 28)


@torch.no_grad()
def test_separable_with_the_true_factors_is_the_chain():
    model, images = Separable(), torch.rand(50, 3, 32, 32)
    weights = _resize_matrix(32, 28, True, torch.float32, torch.device("cpu"))
    model.mix.copy_(torch.tensor([GRAY_WEIGHTS]))
    model.rows.copy_(weights)
    model.columns.copy_(weights)
    assert (model(images) - reference_transform(images)).abs().max() <= ROUNDING


@torch.no_grad()
def test_closed_form_of_linear_is_the_chain():
    model, images = Linear(), torch.rand(50, 3, 32, 32)
    closed_form_(model, images, images)
    # the chain in float64 has taps whose position float32 rounds by up to 2^-24 * 32 pixels
    assert (model(images) - reference_transform(images)).abs().max() <= 4 * ROUNDING


@torch.no_grad()
@pytest.mark.parametrize("noise", [False, True], ids=["natural", "noise"])
def test_closed_form_of_separable_from_16_images_is_the_chain_on_others(noise):
    images = synthetic(300, seed=3)
    first = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8) if noise else images[:20]
    model = Separable()
    closed_form_(model, first, reference_transform(first))
    others = images[100:]
    assert (model(to_float(others)) - reference_transform(others)).abs().max() <= 1e-6
    assert torch.allclose(model.mix, torch.tensor([GRAY_WEIGHTS]) / sum(GRAY_WEIGHTS), atol=1e-5)


@torch.no_grad()
def test_closed_form_takes_the_first_images_alone():
    images = synthetic(ALS_IMAGES + 1, seed=3)
    targets = reference_transform(images)
    models = [Separable(), Separable()]
    closed_form_(models[0], images, targets)
    targets[ALS_IMAGES:] = torch.nan
    closed_form_(models[1], to_float(images), targets)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6)


def test_closed_form_says_how_many_images_it_needs():
    images = synthetic(ALS_AT_LEAST - 1, seed=0)
    with pytest.raises(UserError, match=f"needs {ALS_AT_LEAST} training images"):
        closed_form_(Separable(), images, reference_transform(images))


def refused(images: torch.Tensor, match: str) -> None:
    model, targets = Separable(), reference_transform(images)
    before = nn.utils.parameters_to_vector(model.parameters())
    with pytest.raises(UserError, match=match):
        closed_form_(model, images, targets)
    assert torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))


def test_closed_form_refuses_images_that_leave_factors_open():
    images = synthetic(16, seed=0)
    refused(images[:, :1].expand(-1, 3, -1, -1), "do not determine")  # gray: no channel weights
    refused(torch.zeros(16, 3, 32, 32, dtype=torch.uint8), "do not determine")
    refused(images[:2].repeat(8, 1, 1, 1), "16 images that differ|do not determine")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_closed_form_refuses_values_that_are_not_finite(value):
    images = to_float(synthetic(16, seed=0))
    images[3, 1, 5, 5] = value
    refused(images, "finite")
