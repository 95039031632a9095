"""The plain torch version of the chain against torchvision."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from common.transforms import matmul_transform, reference_transform
from tests.runs import torchvision_chain

SIZES = [  # (H, W) -> size
    ((32, 32), (28, 28)),
    ((28, 28), (28, 28)),
    ((1, 1), (28, 28)),
    ((32, 32), (1, 1)),
    ((941, 7), (10, 13)),
    ((5, 300), (64, 31)),
    ((33, 47), (56, 90)),
    ((100, 100), (99, 101)),
]


@pytest.mark.parametrize(("shape", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_matmul_equals_torchvision(shape, size, dtype):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)).double()
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    expected = torchvision_chain(images, size)
    actual = matmul_transform(images, size)
    assert actual.dtype == expected.dtype
    # the resampling weights agree up to rounding, which grows with the pixel coordinate
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("seed", range(30))
def test_matmul_equals_torchvision_at_random_sizes(seed):
    generator = torch.Generator().manual_seed(seed)
    h, w, oh, ow = torch.randint(1, 130, (4,), generator=generator).tolist()
    hflip, vflip = torch.randint(0, 2, (2,), generator=generator).bool().tolist()
    images = torch.rand(3, h, w, generator=generator)
    expected = torchvision_chain(images, (oh, ow), hflip, vflip)
    actual = matmul_transform(images, (oh, ow), hflip=hflip, vflip=vflip)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_reference_transform_is_the_report_chain():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    out = reference_transform(images)
    assert out.shape == (5, 1, 28, 28)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torchvision_chain(images, (28, 28)), atol=0, rtol=0)
    # both flips: the top left corner of the input is the bottom right corner of the output
    corner = torch.zeros(3, 32, 32)
    corner[:, 0, 0] = 1
    assert reference_transform(corner).flatten().argmax() == 28 * 28 - 1


def test_cached_matrix_is_independent_of_mode():
    """A matrix made under inference_mode or with fake tensors, then training on that size."""
    shape = 2, 3, 23, 19
    with torch.inference_mode():
        matmul_transform(torch.rand(shape))
    with FakeTensorMode():
        assert matmul_transform(torch.rand(shape)).shape == (2, 1, 28, 28)
        matmul_transform(torch.rand(2, 3, 19, 23))
    for size in ((23, 19), (19, 23)):
        images = torch.rand(2, 3, *size, requires_grad=True)
        matmul_transform(images).sum().backward()
        assert images.grad.abs().max() > 0
    assert matmul_transform(torch.rand(shape, device="meta")).shape == (2, 1, 28, 28)


def test_autocast_computes_in_float32():
    images = torch.rand(2, 3, 32, 32)
    expected = matmul_transform(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matmul_transform(images), expected)


def test_derivatives_and_symbolic_sizes():
    images = torch.rand(2, 3, 9, 8)
    direction = torch.rand_like(images)

    def chain(x):
        return matmul_transform(x, (5, 4))

    value, slope = torch.func.jvp(chain, (images,), (direction,))
    assert torch.equal(value, chain(images))
    torch.testing.assert_close(slope, chain(direction), atol=1e-6, rtol=0)
    each = torch.vmap(torch.func.grad(lambda x: chain(x).square().sum()))(images)
    whole = torch.func.grad(lambda x: chain(x).square().sum())(images)
    torch.testing.assert_close(each, whole, atol=1e-5, rtol=1e-5)
    # traced with symbolic sizes, without compiling, which takes seconds
    graph = make_fx(chain, tracing_mode="symbolic")(images)
    other = torch.rand(3, 3, 12, 17)
    torch.testing.assert_close(graph(other), chain(other), atol=1e-6, rtol=0)
