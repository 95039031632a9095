"""What the tests of the CNN, of the perceptual loss and of their fast path share."""

import pytest
import torch

from common import fast_cpu

# The norm of the difference over the norm. A rounding in each of the four layers, forward and
# backward: in float32 it comes from sums of up to 4,500 products, in bfloat16, whose sums are
# float32, from each result; there with a margin of 4.
TOLERANCE = {torch.float32: 8 * 4500**0.5 * 2**-24, torch.bfloat16: 4 * 8 * 2**-8}


@pytest.fixture
def fast_wherever_possible():
    """The fast path wherever it can run, also where it gains nothing."""
    fast_cpu.enable(True)
    yield
    fast_cpu.enable(None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(n=2, side=12):
    return torch.rand(n, 3, side, side, generator=generator())


def assert_near(actual, expected, dtype=torch.float32):
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().double(), expected.detach().double()
    error = torch.linalg.vector_norm(actual - expected)
    assert error <= TOLERANCE[dtype] * torch.linalg.vector_norm(expected)


def plainly(function, *args):
    fast_cpu.enable(False)
    result = function(*args)
    fast_cpu.enable(True)
    return result
