"""The perceptual loss against torchvision's VGG16, plain and fast."""

import copy
import os
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torchvision.models import vgg
from torchvision.transforms.v2.functional import normalize

from common import fast_cpu, fast_kernels
from common.fast_kernels import run_vgg
from common.perceptual import PerceptualLoss, compiled
from common.vgg16 import load_vgg16
from tests.nets import fast_wherever_possible  # noqa: F401

pytestmark = pytest.mark.usefixtures("fast_wherever_possible")

TERMS = ["mse", "vgg2", "vgg7", "vgg14", "vgg21", "vgg28"]
# The relative error of a distance behind 13 convolutions: in float32 each sums up to 9 * 512
# products, in bfloat16, whose sums are float32, each rounds its result.
TOLERANCE = {
    torch.float64: 1e-6,  # mean and std are float32 numbers
    torch.float32: 13 * (9 * 512) ** 0.5 * 2**-24,
    torch.bfloat16: 13 * 2**-8,
}


def grad_tolerance(dtype):
    """Of the gradient's norm. A ReLU or a maximum that is within rounding of a tie may fall either
    way, then all of its gradient differs: a share of squares like the relative error, times 4."""
    return 2 * TOLERANCE[dtype] ** 0.5


@cache
def images(n=3):
    """An output and its target: smooth, as images are, so that maxima tie in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(n, 1, 7, 7, generator=generator)
    target = F.interpolate(target, size=28, mode="bilinear")
    return target + 0.1 * torch.randn(n, 1, 28, 28, generator=generator), target


@cache
def loss_of(weights):
    return PerceptualLoss(weights, 32)


def small_loss():
    """A loss of one's own, to be changed."""
    return copy.deepcopy(loss_of("random"))


@cache
def torchvision_terms(weights, size, dtype):
    """The six terms and their sum's gradient by torchvision's own net, in float64 or autocast."""
    net = vgg.vgg16()
    state = {key: value.double() for key, value in load_vgg16(weights).items()}
    net.load_state_dict(state, strict=False)
    net = net.features.eval().to(torch.float32 if dtype == torch.bfloat16 else dtype)
    output, target = (x.to(next(net.parameters()).dtype) for x in images())
    output.requires_grad_()
    maps = []
    for i in (2, 7, 14, 21, 28):
        net[i].register_forward_hook(lambda module, args, result: maps.append(result.clone()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for x in (output, target):
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
            net(normalize(x.repeat(1, 3, 1, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        pairs = zip(maps[:5], maps[5:], strict=True)
        terms = [F.mse_loss(output, target), *(F.mse_loss(a, b.detach()) for a, b in pairs)]
    (grad,) = torch.autograd.grad(sum(terms), output)
    return torch.stack(terms).detach(), grad


def evaluate(weights, size, dtype):
    """The loss, its six terms and its gradient with respect to the output."""
    loss_fn = loss_of(weights)
    loss_fn.size = size
    exact = torch.promote_types(dtype, torch.float32)
    output, target = (x.to(exact) for x in images())
    output = output.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_fn(output, target)
    (grad,) = torch.autograd.grad(loss, output)
    loss_fn.size = 32
    return loss.detach(), torch.stack(list(loss_fn.terms.values())), grad


def distance(actual, expected):
    """The difference's norm over the expected norm."""
    return ((actual - expected).norm() / expected.norm()).item()


WEIGHTS = [
    "random",
    pytest.param(
        os.environ.get("VGG16_WEIGHTS"),
        id="trained",
        marks=pytest.mark.skipif(
            "VGG16_WEIGHTS" not in os.environ, reason="VGG16_WEIGHTS names no file"
        ),
    ),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [32, 45, 64])
@pytest.mark.parametrize(
    ("dtype", "on"),
    [(torch.float64, False), (torch.float32, False), (torch.float32, True)],
    ids=["float64", "float32", "fast float32"],
)
def test_equals_torchvision(weights, size, dtype, on):
    expected_terms, expected_grad = torchvision_terms(weights, size, torch.float64)
    fast_cpu.enable(on)
    loss, terms, grad = evaluate(weights, size, dtype)
    assert (fast_cpu.status()["vgg"] == "fast") == on
    assert loss.dtype == grad.dtype == dtype
    torch.testing.assert_close(terms.double(), expected_terms, rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(loss, terms.sum())
    assert distance(grad, expected_grad) <= grad_tolerance(dtype)


def test_the_kernels_equal_the_formula_in_float64():
    """Where rounding hides no mistake."""
    loss_fn = small_loss().double()
    loss_fn.size = 45
    results = []
    for distances in (loss_fn.distances, lambda x, y: run_vgg(loss_fn, x, y)):
        output, target = (x.double() for x in images())
        output.requires_grad_()
        values = distances(output, target)
        results.append((values, *torch.autograd.grad(values.sum(), output)))
    for actual, expected in zip(*results, strict=True):
        assert distance(actual, expected) <= 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("on", [False, True], ids=["plain", "fast"])
def test_bfloat16(weights, on):
    exact_terms, exact_grad = torchvision_terms(weights, 32, torch.float64)
    fast_cpu.enable(on)
    loss, terms, grad = evaluate(weights, 32, torch.bfloat16)
    assert (fast_cpu.status()["vgg"] == "fast") == on
    assert loss.dtype == terms.dtype == torch.float32
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(terms, exact_terms.float(), rtol=tolerance, atol=0)
    assert distance(grad, exact_grad) <= grad_tolerance(torch.bfloat16)


def test_batches_cut_into_chunks_give_the_same(monkeypatch):
    whole, (output, target) = loss_of("random"), images()
    results = []
    for chunk in (1, 2, 3):
        monkeypatch.setattr(fast_kernels, "CHUNK", chunk)
        x = output.clone().requires_grad_()
        loss = whole(x, target)
        loss.backward()
        assert fast_cpu.status()["vgg"] == "fast"
        results.append((loss.detach(), x.grad))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=TOLERANCE[torch.float32], atol=0)
        assert distance(grad, results[0][1]) <= grad_tolerance(torch.float32)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "fast"])
def test_frozen_and_out_of_checkpoints(on):
    fast_cpu.enable(on)
    loss = loss_of("random")
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert not any(layer.training for layer in loss.vgg)
    output, target = images()
    output, target = output.clone().requires_grad_(), target.clone().requires_grad_()
    loss(output, target).backward()
    assert target.grad is None
    assert list(loss.terms) == TERMS
    assert not any(term.requires_grad for term in loss.terms.values())
    with torch.no_grad():
        assert not loss(output, target).requires_grad
    once = output.grad.clone()  # scaled, and added to the gradient of another loss
    (2 * loss(output, target)).backward()
    torch.testing.assert_close(output.grad, 3 * once)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "fast"])
def test_first_called_for_validation(on):
    fast_cpu.enable(on)
    loss, (output, target) = small_loss(), images()
    with torch.inference_mode():
        value = loss(output, target)
    output = output.clone().requires_grad_()
    trained = loss(output, target)
    torch.testing.assert_close(trained.detach(), value.clone())
    trained.backward()
    assert output.grad.count_nonzero() > 0


def second_derivative(loss):
    output, target = images()
    output = output.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(output, target), output, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), output)
    return grad.detach(), again


def test_second_derivative():
    """That of all six terms: the MSE alone would give 2 / n times the identity."""
    loss = loss_of("random")
    fast_results = second_derivative(loss)
    assert fast_cpu.status()["vgg"] == "fast"
    fast_cpu.enable(False)
    for actual, expected in zip(fast_results, second_derivative(loss), strict=True):
        assert distance(actual, expected) <= grad_tolerance(torch.float32)


def test_gradient_of_a_single_term():
    loss, (output, target) = loss_of("random"), images()
    grads = []
    for distances in (lambda x: run_vgg(loss, x, target), lambda x: loss.distances(x, target)):
        x = output.clone().requires_grad_()
        grads.append(torch.autograd.grad(distances(x)[3], x)[0])
    assert distance(*grads) <= grad_tolerance(torch.float32)


def hooked(loss):
    loss.vgg[5].register_forward_hook(lambda module, args, output: 2 * output)


def pooled(loss):
    loss.vgg[4] = nn.AvgPool2d(2)


def rescaled(loss):
    loss.vgg[0].weight.mul_(2)


def recentred(loss):
    loss.mean.add_(0.1)


def trainable(loss):
    loss.vgg[0].weight.requires_grad_()


@pytest.mark.parametrize("change", [hooked, pooled, rescaled, recentred, trainable])
def test_a_changed_vgg_is_used(change):
    loss, (output, target) = small_loss(), images()
    before = loss(output, target)
    assert fast_cpu.status()["vgg"] == "fast"
    change(loss)
    after = loss(output, target)
    fast_cpu.enable(False)
    torch.testing.assert_close(after, loss(output, target), rtol=1e-4, atol=0)
    assert change is trainable or abs(after / before - 1) > 1e-3
    if change is trainable:
        after.backward()
        assert loss.vgg[0].weight.grad.count_nonzero() > 0


def test_copied_and_pickled_after_a_call():
    loss, (output, target) = small_loss(), images()
    expected = loss(output.clone().requires_grad_(), target).detach()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(output, target), expected)
        assert torch.equal(sum(other.terms.values()), sum(loss.terms.values()))


def test_torch_func_and_compile():
    loss, (output, target) = small_loss(), images()
    x = output.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, target), x)
    grad = torch.func.grad(loss)(output, target)
    assert distance(grad, expected) <= grad_tolerance(torch.float32)
    each = torch.func.vmap(torch.func.grad(loss))(output[:, None], target[:, None])
    assert distance(each[:, 0] / 3, expected) <= grad_tolerance(torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, target), x)
    assert distance(grad, expected) <= grad_tolerance(torch.float32)


def test_empty_batch():
    """As F.mse_loss: a mean of nothing, NaN, with an empty gradient."""
    output = torch.empty(0, 1, 28, 28, requires_grad=True)
    loss = loss_of("random")(output, torch.empty(0, 1, 28, 28))
    loss.backward()
    assert loss.isnan()
    assert output.grad.shape == output.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_the_formula():
    loss, (output, target) = small_loss(), images()
    expected = loss(output, target)
    value = loss.to("cuda")(output.cuda(), target.cuda())
    assert "cuda" in fast_cpu.status()["vgg"]
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-2, atol=0)  # TF32


def test_needs_two_gray_batches_of_one_shape():
    gray = torch.rand(2, 1, 28, 28)
    for other in (gray[:1], gray[:, 0], gray.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match="N, 1, H, W"):
            loss_of("random")(gray, other)
    with pytest.raises(ValueError, match="N, 1, H, W"):
        loss_of("random")(gray[:, 0], gray[:, 0])


def test_compiled_distances_are_the_plain_ones():
    """In training steps of the largest batch so far; all else runs the plain formula."""
    fast_cpu.enable(False)
    plain, loss, calls = small_loss(), small_loss(), []

    def backend(graph, inputs):
        return lambda *arguments: calls.append(1) or graph(*arguments)

    loss.distances = compiled(loss.distances, backend=backend)
    for count, called in ((2, 2), (3, 4), (2, 4), (3, 5)):  # twice where it is compiled
        results = []
        for each in (plain, loss):
            output, target = (x[:count].clone() for x in images())
            each(output.requires_grad_(), target).backward()
            results.append((output.grad, *each.terms.values()))
        assert all(map(torch.equal, *results))
        assert len(calls) == called
    with torch.inference_mode():
        assert torch.equal(plain(*images()), loss(*images()))
    assert len(calls) == 5


@pytest.mark.parametrize("failing", ["fw_compiler", "bw_compiler"])
def test_a_failed_compilation_warns_and_runs_the_plain_formula(failing):
    fast_cpu.enable(False)

    def fail(graph, inputs):
        raise RuntimeError("no compiler\nand more")

    compilers = {"fw_compiler": lambda graph, inputs: graph.forward, failing: fail}
    loss = small_loss()
    loss.distances = compiled(loss.distances, backend=aot_autograd(**compilers))
    output = images()[0].clone().requires_grad_()
    with pytest.warns(UserWarning, match="torch.compile failed.*no compiler"):
        actual = loss(output, images()[1])
    actual.backward()
    assert torch.equal(actual, small_loss()(*images()))
