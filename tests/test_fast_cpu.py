"""The CNN's fast path gives what the layers give, and its switch."""

import copy
import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import fast_cpu, fast_kernels
from common.fast_kernels import DROP_AT_MOST
from common.models import ConvNet
from tests.nets import (
    assert_near,
    fast_wherever_possible,  # noqa: F401
    generator,
    plainly,
    some_images,
)

pytestmark = pytest.mark.usefixtures("fast_wherever_possible")


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_output_and_gradients_equal_those_of_the_layers(train, dtype, monkeypatch):
    torch.manual_seed(0)
    net = ConvNet().train(train)
    plain = copy.deepcopy(net)
    images = torch.rand(5, 3, 32, 32, generator=generator())
    target = torch.rand(5, 1, 28, 28, generator=generator(1))
    masks = []

    def recorded(like, draw=fast_kernels.random_bits):
        bits = draw(like)
        masks.append((~(bits <= DROP_AT_MOST)).to(dtype) / 0.8)
        return bits

    monkeypatch.setattr(fast_kernels, "random_bits", recorded)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = net(images)
        assert fast_cpu.status()["cnn"] == "fast"
        assert len(masks) == (2 if train else 0)
        for place, mask in zip((4, 7), masks, strict=False):
            plain.layers[place] = Masked(mask)
        expected = plainly(plain, images)
        loss, expected_loss = F.mse_loss(output, target), F.mse_loss(expected, target)
    loss.backward()
    expected_loss.backward()
    assert_near(output, expected, dtype)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, dtype)


def test_a_net_in_bfloat16():
    net, images = ConvNet().bfloat16().eval(), some_images().bfloat16()
    output = net(images)
    assert fast_cpu.status()["cnn"] == "fast"
    assert_near(output, plainly(net, images), torch.bfloat16)


def second_derivative(net, images):
    """Gradients of a gradient penalty with respect to the images and the weights."""
    images = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(images).square().sum(), images, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), [images, net.layers[2].weight])


def test_second_derivative():
    net = ConvNet().eval()
    ours, theirs = second_derivative(net, some_images()), None
    assert fast_cpu.status()["cnn"] == "fast"
    theirs = plainly(second_derivative, net, some_images())
    for actual, expected in zip(ours, theirs, strict=True):
        assert_near(actual, expected)


def test_gradients_that_others_hold_stay_as_they_are():
    """The fast path changes gradients of maps in place, which nobody but itself may see."""
    net = ConvNet().eval()

    def gradients(images):
        images, seen = images.clone().requires_grad_(), []
        net.zero_grad()
        output = net(images)
        output.retain_grad()
        output.register_hook(seen.append)
        images.register_hook(seen.append)
        net.layers[2].weight.register_hook(seen.append)
        given = torch.ones_like(output)
        for _ in range(2):  # the second time through the same graph
            output.backward(given, retain_graph=True)
        assert torch.equal(given, torch.ones_like(output))
        return [*seen, output.grad, images.grad, *(p.grad for p in net.parameters())]

    ours, theirs = gradients(some_images()), plainly(gradients, some_images())
    assert len(ours) == 6 + 2 + 8
    for actual, expected in zip(ours, theirs, strict=True):
        assert_near(actual, expected)


def test_frozen_weights_and_recomputed_activations():
    net, images = ConvNet(), some_images()
    net.layers[2].requires_grad_(False)
    torch.manual_seed(0)
    net(images).sum().backward()
    expected = [p.grad for p in net.parameters()]
    assert [grad is None for grad in expected] == [False] * 2 + [True] * 2 + [False] * 4
    net.zero_grad()
    torch.manual_seed(0)
    checkpoint(net, images, use_reentrant=False).sum().backward()
    assert fast_cpu.status()["cnn"] == "fast"
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    net, images = ConvNet().eval(), some_images()
    expected = plainly(net, images)
    with mode():
        assert_near(net(images), expected)
        assert fast_cpu.status()["cnn"] == "fast"


# --- the switch ---------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """As at the start of a process."""
    fast_cpu._missing.cache_clear()
    monkeypatch.setattr(fast_cpu, "_checked", {})
    yield
    fast_cpu._missing.cache_clear()


def test_float32_is_plain_and_bfloat16_fast_where_the_processor_has_it(monkeypatch):
    net, images = ConvNet().eval(), some_images()
    fast_cpu.enable(None)
    for native in (False, True):
        monkeypatch.setattr(fast_cpu, "_native_bf16", lambda native=native: native)
        net(images)
        assert "float32" in fast_cpu.status()["cnn"]
        with torch.autocast("cpu", torch.bfloat16):
            net(images)
        assert (fast_cpu.status()["cnn"] == "fast") == native


@pytest.mark.parametrize("setting", ["0", "1"])
def test_the_environment_switches_it_off(setting, monkeypatch):
    """In a new copy of the module, as it reads the variable when it is imported."""
    monkeypatch.setenv("FAST_CPU", setting)
    spec = importlib.util.spec_from_file_location("copy_of_fast_cpu", fast_cpu.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "_native_bf16", lambda: True)
    images = torch.rand(1, 3, 9, 9).bfloat16()
    assert fresh.can_run_net(ConvNet().bfloat16().layers, images) == (setting == "1")
    assert fresh.status()["cnn"] == ("fast" if setting == "1" else "switched off")


def test_without_a_private_name_the_layers_run(unchecked, monkeypatch):
    monkeypatch.setattr(fast_cpu, "PRIVATE", ("ops.mkldnn.renamed",))
    net, images = ConvNet().eval(), some_images()
    with pytest.warns(UserWarning, match="no torch.ops.mkldnn.renamed"):
        output = net(images)
    assert torch.equal(output, plainly(net, images))
    with warnings.catch_warnings(action="error"):  # told once
        net(images)
    assert "renamed" in fast_cpu.status()["cnn"]


def wrong(layers, images):
    return layers(images) * 1.01


def broken(layers, images):
    raise RuntimeError("unknown overload\nin this torch")


@pytest.mark.parametrize(("kernel", "words"), [(wrong, "differs"), (broken, "unknown overload")])
def test_a_kernel_that_changed_its_meaning_is_not_used(unchecked, monkeypatch, kernel, words):
    monkeypatch.setattr(fast_cpu, "run_net", kernel)
    net, images = ConvNet().eval(), some_images()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=words), torch.inference_mode():
        net(images)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    assert fast_cpu.status()["cnn"] != "fast"
