"""Whatever could show the CNN's fast path, from a hook to torch.compile, runs the layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from common import fast_cpu
from common.models import ConvNet
from tests.nets import assert_near, fast_wherever_possible, plainly, some_images  # noqa: F401

pytestmark = pytest.mark.usefixtures("fast_wherever_possible")


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
def test_a_changed_layer_is_used(change):
    net, images = ConvNet().eval(), some_images()
    change(net.layers)
    output = net(images)
    assert fast_cpu.status()["cnn"] != "fast"
    assert torch.equal(output, plainly(net, images))


def test_a_dropout_without_its_effect_in_training():
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


def test_modes_and_tensors_of_other_kinds():
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
