"""The perceptual loss against the same loss in plain torch and torchvision; its weight files."""

import os
import pickle
from functools import cache
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg

from common import UserError, perceptual
from common.perceptual import TERMS, PerceptualLoss, load_vgg16
from tests.measure_cnn_step import plain_features, plain_perceptual


@cache
def images(n=3):
    """An output and its target: smooth, as images are, so that maxima tie in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(n, 1, 7, 7, generator=generator)
    target = F.interpolate(target, size=28, mode="bilinear")
    return target + 0.1 * torch.randn(n, 1, 28, 28, generator=generator), target


@cache
def ours(weights):
    return PerceptualLoss(weights)


@cache
def plain_vgg(weights):
    return plain_features(weights)


@cache
def evaluate(what, weights, size, dtype):
    """what, "ours" or "plain": the loss, its six terms, its gradient with respect to the output."""
    output, target = images()
    exact = torch.promote_types(dtype, torch.float32)
    output, target = output.to(exact, copy=True).requires_grad_(), target.to(exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if what == "ours":
            loss_fn = ours(weights)
            loss_fn.size = size
            loss = loss_fn(output, target)
            terms = list(loss_fn.terms.values())
        else:
            terms = plain_perceptual(plain_vgg(weights).to(exact), output, target, size)
            loss = sum(terms)
    (grad,) = torch.autograd.grad(loss, output)
    return loss.detach(), torch.stack([term.detach().to(exact) for term in terms]), grad


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
def test_equals_plain_torch(weights, size):
    expected, expected_terms, expected_grad = evaluate("plain", weights, size, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        loss, terms, grad = evaluate("ours", weights, size, dtype)
        assert loss.dtype == grad.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(terms.double(), expected_terms, rtol=tolerance, atol=0)
        torch.testing.assert_close(loss, terms.sum())
        far = (grad - expected_grad).abs() > tolerance * expected_grad.abs().max()
        # Where a ReLU or a maximum is within float32's rounding of a tie it may fall either way,
        # plain torch's too, for all the few pixels that it sees.
        assert far.double().mean() <= (0.05 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bfloat16_is_as_good_as_plain_bfloat16(weights):
    """The loss within 1e-2. No two orders of bfloat16 sums agree as well about the gradient,
    since a ReLU passes all or nothing: it is as near to the exact one as plain torch's own."""
    exact, exact_terms, exact_grad = evaluate("plain", weights, 64, torch.float64)
    plain, plain_terms, plain_grad = evaluate("plain", weights, 64, torch.bfloat16)
    loss, terms, grad = evaluate("ours", weights, 64, torch.bfloat16)
    assert loss.dtype == torch.float32
    for value, others in ((loss, (exact, plain)), (terms, (exact_terms, plain_terms))):
        for other in others:
            torch.testing.assert_close(value, other.float(), rtol=1e-2, atol=0)
    assert distance(grad, exact_grad) < max(1e-2, 1.25 * distance(plain_grad, exact_grad))


def test_batches_cut_into_chunks_give_the_same(monkeypatch):
    whole, (output, target) = ours("random"), images()
    whole.size = 32
    results = []
    for chunk in (1, 2, 3):
        monkeypatch.setitem(perceptual.CHUNK, "cpu", chunk)
        x = output.clone().requires_grad_()
        loss = whole(x, target)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-8)


def test_frozen_and_out_of_checkpoints():
    loss = ours("random")
    loss.size = 32
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    output, target = images()
    output, target = output.clone().requires_grad_(), target.clone().requires_grad_()
    loss(output, target).backward()
    assert target.grad is None
    assert list(loss.terms) == list(TERMS)
    assert not any(part.requires_grad for part in loss.terms.values())
    with torch.no_grad():
        value = loss(output, target)
    assert not value.requires_grad
    # scaled upstream, and beside another loss
    once = output.grad.clone()
    (2 * loss(output, target)).backward()
    torch.testing.assert_close(output.grad, 3 * once)


def test_needs_two_gray_batches_of_one_shape():
    gray = torch.rand(2, 1, 28, 28)
    for other in (gray[:1], gray[:, 0], gray.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match="N, 1, H, W"):
            ours("random")(gray, other)
    with pytest.raises(ValueError, match="N, 1, H, W"):
        ours("random")(gray[:, 0], gray[:, 0])


def test_random_is_always_the_same_and_draws_nothing():
    state = torch.get_rng_state()
    first, second = load_vgg16("random"), load_vgg16("random")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


def small(state):
    """Of each tensor one number, expanded: the files stay small."""
    return {key: value.flatten()[:1].expand(value.shape) for key, value in state.items()}


@cache
def good():
    return small(load_vgg16("random"))


def save(path, state):
    torch.save(state, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classifier", [False, True])
def test_loads_any_float_dtype_whole_or_features_only(tmp_path, dtype, classifier):
    state = small({key: value.to(dtype) for key, value in good().items()})
    if classifier:
        one = torch.ones(1)
        state |= {f"classifier.{i}.{k}": one for i in (0, 3, 6) for k in ("weight", "bias")}
    loaded = load_vgg16(save(tmp_path / "vgg.pth", state))
    assert list(loaded) == list(good())
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, good()[key].to(dtype).float())


class Code:
    def __reduce__(self):
        return print, ("run",)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


WEIGHT, BIAS = "features.28.weight", "features.0.bias"
BAD_FILES = {
    "another network": (lambda s: small(vgg.make_layers(vgg.cfgs["A"]).state_dict()), "lacks key"),
    "a missing key": (lambda s: without(s, BIAS), f"lacks key {BIAS}"),
    "an extra key": (lambda s: s | {"features.30.weight": s[WEIGHT]}, "extra key features.30"),
    "half a classifier": (lambda s: s | {"classifier.0.bias": s[BIAS]}, "extra key classifier"),
    "a wrong shape": (lambda s: s | {WEIGHT: s[WEIGHT][:, :, :2]}, f"{WEIGHT} is"),
    "integers": (lambda s: s | {BIAS: torch.zeros(64, dtype=torch.int64)}, "torch.int64"),
    "a NaN": (lambda s: s | {BIAS: torch.full((64,), float("nan"))}, f"{BIAS} is not finite"),
    "an infinity": (
        lambda s: s | {BIAS: torch.full((64,), 1e300, dtype=torch.float64)},
        "is not finite",
    ),
    "a list": (lambda s: list(s.values()), "not a state dict"),
    "a tensor": (lambda s: s[WEIGHT], "not a state dict"),
    "a checkpoint": (lambda s: {"model": s}, "not a state dict"),
    "other keys": (lambda s: {1: s[WEIGHT], "a": s[BIAS]}, "lacks key"),
    "code": (lambda s: {"features.0.weight": Code()}, "tensors only"),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_weights(tmp_path, change, message, capsys):
    path = save(tmp_path / "vgg.pth", change(good()))
    with pytest.raises(UserError, match=message) as caught:
        PerceptualLoss(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        PerceptualLoss(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such file"):
        PerceptualLoss(tmp_path)
    whole = save(tmp_path / "vgg.pth", good()).read_bytes()
    for content in (
        b"",
        b"hello\n",
        whole[: len(whole) // 2],
        whole[:-100],
        pickle.dumps(Code(), 2),
    ):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(UserError, match="not a whole PyTorch file"):
            PerceptualLoss(str(tmp_path / "bad.pth"))


@pytest.mark.parametrize("size", [31, 0, -224])
def test_bad_size_is_told_before_the_weights_are_read(size):
    with pytest.raises(UserError, match="32"):
        PerceptualLoss("/no/such/file", size)


def test_imagenet_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(UserError, match="no network") as caught:
        PerceptualLoss("imagenet")
    for word in ("vgg16-397923af.pth", "528 MB", "--vgg-weights", str(tmp_path)):
        assert word in str(caught.value)
    # put there by hand, it is taken
    assert torch.hub.get_dir().startswith(str(tmp_path))
    save(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth", good())
    PerceptualLoss("imagenet", 32)
