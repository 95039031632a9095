"""fuse(chain) against torchvision, step by step, over 1,000 random chains."""

import pytest
import torch

from common.fused import fuse
from tests.chains import LEVEL, draw, step_by_step

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
            bicubic = sum(getattr(t, "interpolation", None) == "bicubic" for t in chain)
            unit = 1e-13 if x.dtype == torch.float64 else 1e-6
            allowed = max(allowed, unit * max(bicubic, 1) * max(largest for _, largest in each))
        difference = (actual.double() - expected.double()).abs().max().item()
        assert difference <= allowed, f"{note}: {difference} > {allowed}"
