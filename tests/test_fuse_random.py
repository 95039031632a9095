"""fuse(chain) against torchvision, step by step, over 1,000 random chains."""

import pytest
import torch
from torchvision.transforms import v2

from common.fused import fuse
from common.fused.bands import resize, resize_each
from tests.chains import LEVEL, MODES, draw, step_by_step

CHAINS = 1000


@pytest.mark.parametrize("part", range(20))
def test_random_chains_equal_torchvision(part):
    for i in range(part, CHAINS, 20):
        chain, level, x = draw(i)
        fused = fuse(chain)
        torch.manual_seed(i)
        each = [step_by_step(chain, one) for one in (x[None] if x.dim() == 3 else x)]
        state = torch.get_rng_state()
        expected = torch.stack([result for result, _ in each]).view(
            *x.shape[:-3], *each[0][0].shape
        )
        torch.manual_seed(i)
        actual = fused(x)
        note = f"chain {i}: {tuple(x.shape)} {x.dtype} {chain}"
        assert torch.equal(torch.get_rng_state(), state), note
        assert actual.shape == expected.shape, note
        assert actual.dtype == expected.dtype, note
        allowed = level * (1 if expected.dtype == torch.uint8 else LEVEL)
        if expected.dtype != torch.uint8:
            # each bicubic resize adds a sum of up to 8 x 8 products with weights beyond 0 and 1
            bicubic = sum(getattr(t, "interpolation", None) == MODES[1] for t in chain)
            unit = 1e-13 if x.dtype == torch.float64 else 1e-6
            allowed = max(allowed, unit * max(bicubic, 1) * max(largest for _, largest in each))
        difference = (actual.double() - expected.double()).abs().max().item()
        assert difference <= allowed, f"{note}: {difference} > {allowed}"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_weights_of_a_box_do_not_depend_on_the_other_boxes(mode):
    """Bit by bit: weights are padded to the longest of a batch, and their sums must not notice."""
    lengths = list(range(1, 400, 7))
    batch = resize_each(lengths, 28, mode, True, torch.float32, 3)
    for weight, length in zip(batch.weight, lengths, strict=True):
        alone = resize(length, 28, mode).weight[0]
        assert torch.equal(weight[:, : alone.shape[1]], alone), length


def test_a_crop_depends_on_no_other_crop_of_its_batch():
    """Bit by bit, at scales below 2, where the kernel goes about all crops in the same way."""
    fused = fuse(v2.RandomResizedCrop(80, interpolation=v2.InterpolationMode.BICUBIC))
    images = torch.rand(24, 3, 120, 150, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    batch = fused(images)
    torch.manual_seed(1)
    for image, expected in zip(images, batch, strict=True):
        assert torch.equal(fused(image), expected)
