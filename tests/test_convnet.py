"""The CNN: its layers, its fast path against them, its dropout, its receptive field."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common import fast_cpu, fast_kernels
from common.fast_kernels import DROP_AT_MOST
from common.models import ConvNet
from common.transforms import reference_transform
from tests.runs import ROOT

# Of the norm of the difference over the norm. Four layers round, forward and backward: in float32
# their sums of up to 4,500 products, in bfloat16, which sums in float32, their results, with a
# margin of 4.
TOLERANCE = {torch.float32: 8 * 4500**0.5 * 2**-24, torch.bfloat16: 4 * 8 * 2**-8}
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


@pytest.fixture(autouse=True)
def fast():
    """Enables the fast path in float32 and on any processor."""
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


def test_layers_match_the_report():
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


# --- the fast path equals the layers ------------------------------------------------------------


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


def test_bfloat16_weights():
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


def test_in_place_backward_does_not_change_visible_gradients():
    """The fast path changes gradients in place; no gradient that a user can access may change."""
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
        for _ in range(2):  # backward twice through the same graph
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
def test_inference_modes(mode):
    net, images = ConvNet().eval(), some_images()
    expected = plainly(net, images)
    with mode():
        assert_near(net(images), expected)
        assert fast_cpu.status()["cnn"] == "fast"


# --- hooks, changed layers and transforms run the plain layers ----------------------------------


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_every_layer_are_called(register):
    net, called = ConvNet(), []
    modules = [net, net.layers, *net.layers]
    for module in modules:
        getattr(module, register)(lambda module, *args: called.append(module))
    net(some_images().requires_grad_()).sum().backward()
    assert set(called) == set(modules)
    assert len(called) == len(modules)


@pytest.mark.parametrize("register", HOOKS[1:3])
def test_global_hooks_are_called(register):
    net, called = ConvNet(), []
    name = register.replace("register_", "register_module_")
    handle = getattr(nn.modules.module, name)(lambda module, *args: called.append(module))
    try:
        net(some_images().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert set(called) == {net, net.layers, *net.layers}


def replace(place, module):
    def change(layers):
        layers[place] = module()

    return change


def attribute(place, name, value):
    return lambda layers: setattr(layers[place], name, value)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "p": attribute(4, "p", 0.0),
    "inplace": attribute(1, "inplace", True),
    "padding": attribute(5, "padding", (2, 2)),
    "stride": attribute(2, "stride", (2, 2)),
    "no bias": attribute(5, "bias", None),
    "forward": attribute(3, "forward", torch.sigmoid),
    "activation": replace(1, nn.GELU),
    "subclass": replace(5, lambda: Doubled(64, 64, 4, padding=1)),
    "one layer more": lambda layers: layers.append(nn.Sigmoid()),
    "fewer channels": lambda layers: (
        replace(0, lambda: nn.Conv2d(3, 8, 4, padding=1))(layers),
        replace(2, lambda: nn.Conv2d(8, 64, 4, padding=1))(layers),
    ),
    "pruned": lambda layers: prune.random_unstructured(layers[2], "weight", amount=0.5),
    "weight norm": lambda layers: parametrizations.weight_norm(layers[5]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_layer_runs_the_plain_path(change):
    net, images = ConvNet().eval(), some_images()
    change(net.layers)
    output = net(images)
    assert fast_cpu.status()["cnn"] != "fast"
    assert torch.equal(output, plainly(net, images))


def test_dropout_with_p_0_in_training():
    net, images = ConvNet().train(), some_images()
    for layer in (net.layers[4], net.layers[7]):
        layer.p = 0.0
    assert torch.equal(net(images), net(images))
    assert_near(net(images), copy.deepcopy(net).eval()(images))


@pytest.mark.parametrize("on", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("place", [4, 7])
def test_dropout_follows_its_own_mode(place, on):
    fast_cpu.enable(on)
    net, images = ConvNet().eval(), some_images()
    expected = net(images)
    net.layers[place].train()
    assert not torch.equal(net(images), net(images))
    net.train()
    net.layers[4].eval()
    net.layers[7].eval()
    assert_near(net(images), expected)


def weights(net):
    return {name: value.detach() for name, value in net.named_parameters()}


def test_torch_func():
    net, images = ConvNet().eval(), some_images(3)

    def loss(params, images):
        return torch.func.functional_call(net, params, (images,)).square().sum()

    expected = torch.autograd.grad(net(images).square().sum(), list(net.parameters()))
    grads = torch.func.grad(loss)(weights(net), images)
    for actual, other in zip(grads.values(), expected, strict=True):
        assert_near(actual, other)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights(net), images[:, None])
    for actual, other in zip(each.values(), expected, strict=True):
        assert_near(actual.sum(0), other)
    with torch.no_grad():
        assert_near(torch.func.vmap(net)(images[:, None])[:, 0], net(images))


def test_forward_mode():
    net, images = ConvNet().eval(), some_images().requires_grad_()
    direction, weight = (torch.rand_like(x) for x in (images, net(images)))
    (grad,) = torch.autograd.grad((net(images) * weight).sum(), images)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(images, direction))).tangent
    assert_near((tangent * weight).sum(), (grad * direction).sum())


def test_compiled_in_one_graph():
    net, images = ConvNet().eval(), some_images()
    expected = net(images)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_near(compiled(images), expected)
    net.train()
    assert not torch.equal(compiled(images), compiled(images))
    compiled(images).sum().backward()
    exported = torch.export.export(net.eval(), (images,)).module()
    assert_near(exported(images), expected)


def test_dispatch_modes_meta_and_tensor_subclasses():
    net, images = ConvNet().eval(), some_images()
    with FlopCounterMode(display=False) as counter:
        net(images)
    pixels = {(3, 64): 11 * 11, (64, 64): 10 * 10 + 9 * 9, (64, 1): 8 * 8}
    flops = sum(2 * 2 * 16 * a * b * n for (a, b), n in pixels.items())
    assert counter.get_total_flops() == flops
    assert ConvNet().to("meta")(images.to("meta")).shape == (2, 1, 8, 8)

    class Tagged(torch.Tensor):
        pass

    assert type(net(images.as_subclass(Tagged))) is Tagged
    assert net.double()(images.double()).dtype == torch.float64


def test_empty_batch():
    net = ConvNet()
    net(torch.empty(0, 3, 32, 32)).sum().backward()
    assert net(torch.empty(0, 3, 32, 32)).shape == (0, 1, 28, 28)
    assert all(p.grad.count_nonzero() == 0 for p in net.parameters())


def test_copied_and_pickled():
    net, images = ConvNet().eval(), some_images()
    expected = net(images)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(images), expected)
        assert fast_cpu.status()["cnn"] == "fast"


# --- the switch ---------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Resets the cached checks to the state at the start of a process."""
    fast_cpu._missing.cache_clear()
    monkeypatch.setattr(fast_cpu, "_checked", {})
    yield
    fast_cpu._missing.cache_clear()


def test_fast_path_needs_native_bfloat16(monkeypatch):
    net, images = ConvNet().eval(), some_images()
    fast_cpu.enable(None)
    for native in (False, True):
        monkeypatch.setattr(fast_cpu, "_native_bf16", lambda native=native: native)
        net(images)
        assert "float32" in fast_cpu.status()["cnn"]
        with torch.autocast("cpu", torch.bfloat16):
            net(images)
        assert (fast_cpu.status()["cnn"] == "fast") == native


def test_environment_variable_disables_the_fast_path():
    code = "from common import fast_cpu, models; import torch; fast_cpu._native_bf16 = lambda: 1\n"
    code += "models.ConvNet().bfloat16()(torch.rand(1, 3, 9, 9).bfloat16())\n"
    code += "print(fast_cpu.status()['cnn'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FAST_CPU": "0"}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "switched off"


def test_missing_private_operator_runs_the_plain_path(unchecked, monkeypatch):
    monkeypatch.setattr(fast_cpu, "PRIVATE", ("ops.mkldnn.renamed",))
    net, images = ConvNet().eval(), some_images()
    with pytest.warns(UserWarning, match="no torch.ops.mkldnn.renamed"):
        output = net(images)
    assert torch.equal(output, plainly(net, images))
    with warnings.catch_warnings(action="error"):  # warned once
        net(images)
    assert "renamed" in fast_cpu.status()["cnn"]


def wrong(layers, images):
    return layers(images) * 1.01


def broken(layers, images):
    raise RuntimeError("unknown overload\nin this torch")


@pytest.mark.parametrize(("kernel", "words"), [(wrong, "differs"), (broken, "unknown overload")])
def test_failed_self_check_runs_the_plain_path(unchecked, monkeypatch, kernel, words):
    monkeypatch.setattr(fast_cpu, "run_net", kernel)
    net, images = ConvNet().eval(), some_images()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=words), torch.inference_mode():
        net(images)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    assert fast_cpu.status()["cnn"] != "fast"


# --- what the net can and cannot do ------------------------------------------------------------


def test_fixed_flip_equals_flipping_the_input():
    net, fixed = ConvNet().eval(), ConvNet(flip="fixed").eval()
    fixed.load_state_dict(net.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=generator())
    torch.testing.assert_close(fixed(images), net(images.flip(2, 3)))


@pytest.mark.parametrize("on", [True, False], ids=["fast", "plain"])
def test_nan_in_the_images_gives_a_nan_loss(on):
    fast_cpu.enable(on)
    images = some_images()
    images[0, 0, 6, 6] = float("nan")
    assert F.mse_loss(ConvNet()(images), torch.zeros(2, 1, 8, 8)).isnan()


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
def test_dropout_depends_only_on_the_random_state(on):
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


def test_receptive_field_excludes_flipped_pixel():
    """The receptive field is 13x13 input pixels. It contains the flipped pixel only for the 6x6
    outputs in the middle."""
    net = ConvNet().eval()
    for parameter in net.parameters():  # no dead units and no cancellation
        parameter.data.abs_()
    assert torch.equal(seen(net, 14, 14), box((10, 23), (10, 23)))  # 13x13
    assert torch.equal(seen(net, 0, 0), box((0, 9), (0, 9)))
    assert torch.equal(seen(net, 0, 27), box((0, 9), (23, 32)))
    assert torch.equal(seen(net, 27, 27), box((23, 32), (23, 32)))
    # Receptive field and source region are products of rows and columns, so rows are enough.
    sighted = [
        y
        for y in range(28)
        if (seen(net, y, y) & seen(reference_transform, y, y)).any(dim=1).sum()
        == seen(reference_transform, y, y).any(dim=1).sum()
    ]
    assert sighted == list(range(11, 17))
