"""The perceptual loss against the same loss in plain torch and torchvision; its weight files."""

import os
import pickle
from functools import cache
from urllib.error import URLError

import pytest
import torch
from torchvision.models import vgg

from common import UserError, perceptual
from common.perceptual import TERMS, PerceptualLoss, load_vgg16
from tests.measure_cnn_step import plain_features, plain_perceptual


@cache
def features(weights):
    return plain_features(weights)


@cache
def images(n=3):
    """An output and its target: smooth, as images are, so that maxima tie in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(n, 1, 7, 7, generator=generator)
    target = torch.nn.functional.interpolate(target, size=28, mode="bilinear")
    return target + 0.1 * torch.randn(n, 1, 28, 28, generator=generator), target


def evaluate(loss_fn, dtype):
    """Loss, its six terms and its gradient with respect to the output."""
    output, target = images()
    output = output.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, terms = loss_fn(output, target)
    loss.backward()
    return loss.detach(), torch.stack([term.detach().float() for term in terms]), output.grad


def plain(weights, size):
    def loss_fn(output, target):
        terms = plain_perceptual(features(weights), output, target, size)
        return sum(terms), terms

    return loss_fn


def ours(weights, size):
    loss = PerceptualLoss(weights, size)
    return lambda output, target: (loss(output, target), list(loss.parts.values()))


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
    loss, terms, grad = evaluate(ours(weights, size), torch.float32)
    expected, expected_terms, expected_grad = evaluate(plain(weights, size), torch.float32)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, terms.sum())
    limit = 1e-5 * expected_grad.abs().max().item()
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=limit)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bfloat16_is_as_good_as_plain_bfloat16(weights):
    """The loss within 1e-2. Of the gradient no two orders of bfloat16 sums agree as well, since
    each ReLU passes it or not: it is as far from float32's as plain torch's own."""
    truth = evaluate(plain(weights, 64), torch.float32)
    loss, terms, grad = evaluate(ours(weights, 64), torch.bfloat16)
    expected, expected_terms, expected_grad = evaluate(plain(weights, 64), torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=0)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-2, atol=0)
    torch.testing.assert_close(loss, truth[0], rtol=1e-2, atol=0)
    assert distance(grad, truth[2]) < max(1e-2, 1.25 * distance(expected_grad, truth[2]))


def test_batches_cut_into_chunks_give_the_same(monkeypatch):
    whole = PerceptualLoss("random", 32)
    output, target = images()
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
    loss = PerceptualLoss("random", 32)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    output, target = images()
    output, target = output.clone().requires_grad_(), target.clone().requires_grad_()
    loss(output, target).backward()
    assert target.grad is None
    assert list(loss.parts) == list(TERMS)
    assert not any(part.requires_grad for part in loss.parts.values())
    with torch.no_grad():
        value = loss(output, target)
    assert not value.requires_grad
    # scaled upstream, and beside another loss
    once = output.grad.clone()
    (2 * loss(output, target)).backward()
    torch.testing.assert_close(output.grad, 3 * once)


def test_random_is_always_the_same():
    first, second = load_vgg16("random"), load_vgg16("random")
    assert all(torch.equal(first[key], second[key]) for key in first)


def small(state):
    """Cheap to store: one number, expanded."""
    return {key: value.flatten()[:1].expand(value.shape) for key, value in state.items()}


@cache
def good():
    # stored tensors share one number, which keeps the files small and the tests fast
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
    "another network": (lambda s: vgg.vgg11(num_classes=1).features.state_dict(), "lacks key"),
    "a missing key": (lambda s: without(s, BIAS), f"lacks key {BIAS}"),
    "an extra key": (lambda s: s | {"features.30.weight": s[WEIGHT]}, "extra key features.30"),
    "half a classifier": (lambda s: s | {"classifier.0.bias": s[BIAS]}, "extra key classifier"),
    "a wrong shape": (lambda s: s | {WEIGHT: s[WEIGHT][:, :, :2]}, f"{WEIGHT} is"),
    "integers": (lambda s: s | {BIAS: torch.zeros(64, dtype=torch.int64)}, "torch.int64"),
    "a NaN": (lambda s: s | {BIAS: torch.full((64,), float("nan"))}, f"{BIAS} is not finite"),
    "an infinity": (lambda s: s | {BIAS: torch.full((64,), 1e300).double()}, "is not finite"),
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
    for content in (b"", b"hello\n", whole[: len(whole) // 2], whole[:-100], pickle.dumps(Code())):
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
