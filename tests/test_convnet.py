"""The CNN: its layers, the dropout of its fast path, what it can and cannot learn."""

import pytest
import torch

from common import fast_cpu, fast_kernels
from common.fast_kernels import DROP_AT_MOST
from common.models import ConvNet
from common.transforms import reference_transform
from tests.nets import fast_wherever_possible, generator  # noqa: F401

pytestmark = pytest.mark.usefixtures("fast_wherever_possible")

LAYERS = [
    "Conv2d(3, 64, kernel_size=(4, 4), stride=(1, 1), padding=(1, 1))",
    "ReLU()",
    "Conv2d(64, 64, kernel_size=(4, 4), stride=(1, 1), padding=(1, 1))",
    "ReLU()",
    "Dropout(p=0.2, inplace=False)",
    "Conv2d(64, 64, kernel_size=(4, 4), stride=(1, 1), padding=(1, 1))",
    "ReLU()",
    "Dropout(p=0.2, inplace=False)",
    "Conv2d(64, 1, kernel_size=(4, 4), stride=(1, 1), padding=(1, 1))",
]


def test_layers_are_the_reports():
    net = ConvNet()
    assert [str(layer) for layer in net.layers] == LAYERS
    assert list(net.state_dict()) == [
        f"layers.{i}.{kind}" for i in (0, 2, 5, 8) for kind in ("weight", "bias")
    ]
    assert sum(p.numel() for p in net.parameters()) == 135_361
    for size in (32, 20):
        assert net(torch.rand(2, 3, size, size)).shape == (2, 1, size - 4, size - 4)
    with pytest.raises(ValueError, match="flip"):
        ConvNet(flip="both")


def test_fixed_flip_is_the_same_net_behind_a_flip():
    net, fixed = ConvNet().eval(), ConvNet(flip="fixed").eval()
    fixed.load_state_dict(net.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=generator())
    torch.testing.assert_close(fixed(images), net(images.flip(2, 3)))


def test_nan_reaches_the_loss():
    images = torch.rand(2, 3, 32, 32)
    images[0, 0, 16, 16] = float("nan")
    assert ConvNet()(images).isnan().any()


def dropped(like):
    return fast_kernels.random_bits(like) <= DROP_AT_MOST


def test_dropout_probability():
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):  # through the kernel that the net uses
        kept = torch.ops.aten.threshold_backward(
            torch.ones(2**16, dtype=dtype), patterns.to(dtype), DROP_AT_MOST
        )
        assert abs((kept == 0).double().mean() - 0.2) < 1e-4
    torch.manual_seed(0)
    share = dropped(torch.empty(64, 64, 30, 30)).double().mean()
    assert abs(share - 0.2) < 5 * (0.16 / 64**2 / 900) ** 0.5


def test_dropout_masks_are_independent():
    torch.manual_seed(0)
    like = torch.empty(16, 64, 30, 30)
    first, second = (dropped(like).permute(0, 2, 3, 1).float() - 0.2 for _ in range(2))
    flat = first.flatten()
    pairs = {
        "two calls": (first, second),
        "two calls, a lane apart": (flat[1:], second.flatten()[:-1]),
        **{f"lag {i}": (flat[i:], flat[:-i]) for i in (1, 2, 3, 4, 64, 64 * 30)},
        "channels": (first[..., 1:], first[..., :-1]),
        "images": (first[1:], first[:-1]),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / 0.16
        assert abs(correlation) < 5 / a.numel() ** 0.5, name
    per_channel = (first + 0.2).mean(dim=(0, 1, 2))
    assert (per_channel - 0.2).abs().max() < 5 * (0.16 / 16 / 900) ** 0.5


@pytest.mark.parametrize("on", [True, False], ids=["fast", "plain"])
def test_torch_random_state_decides_the_bits(on):
    fast_cpu.enable(on)
    net, images = ConvNet(), torch.rand(3, 3, 32, 32)
    torch.manual_seed(5)
    outputs = [net(images) for _ in range(2)]
    assert not torch.equal(*outputs)
    torch.manual_seed(5)
    net(images)
    state = torch.get_rng_state()
    assert torch.equal(net(images), outputs[1])
    torch.set_rng_state(state)
    assert torch.equal(net(images), outputs[1])


def seen(function, y, x):
    """(32, 32) bool: the input pixels on which output pixel (y, x) of function depends."""
    images = torch.rand(1, 3, 32, 32, generator=generator()).requires_grad_()
    function(images)[0, 0, y, x].backward()
    return images.grad[0].abs().sum(0) > 0


def box(rows, columns):
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def test_the_net_cannot_mirror():
    """An output pixel sees 13x13 input pixels, and the pixel that belongs there after the flips
    lies outside of them, but for the 6x6 outputs in the middle."""
    net = ConvNet().eval()
    for parameter in net.parameters():  # no unit dead, no two paths that cancel
        parameter.data.abs_()
    assert torch.equal(seen(net, 14, 14), box((10, 23), (10, 23)))  # 13x13
    assert torch.equal(seen(net, 0, 0), box((0, 9), (0, 9)))
    assert torch.equal(seen(net, 0, 27), box((0, 9), (23, 32)))
    assert torch.equal(seen(net, 27, 27), box((23, 32), (23, 32)))
    # Both are products of rows and columns, so rows alone tell which outputs see their source.
    sighted = [
        y
        for y in range(28)
        if (seen(net, y, y) & seen(reference_transform, y, y)).any(dim=1).sum()
        == seen(reference_transform, y, y).any(dim=1).sum()
    ]
    assert sighted == list(range(11, 17))
