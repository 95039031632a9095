"""VGG16 weight files: which are taken, which are refused with one line."""

import pickle
from functools import cache
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.models import vgg

from common import UserError
from common.perceptual import PerceptualLoss
from common.vgg16 import load_vgg16


def test_random_is_always_the_same_and_draws_nothing():
    state = torch.get_rng_state()
    first, second = load_vgg16("random"), load_vgg16("random")
    assert all(torch.equal(first[key], second[key]) for key in first)
    PerceptualLoss("random", 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "vgg.pth", good())
    PerceptualLoss("~/vgg.pth", 32)


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
    with pytest.raises(UserError, match="cannot be read: not a file"):
        PerceptualLoss(tmp_path)
    with pytest.raises(UserError, match="cannot be read: file name too long"):
        PerceptualLoss(tmp_path / ("x" * 300))
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


@pytest.mark.parametrize(("owner", "call"), [(Path, "stat"), (torch, "load")])
def test_weights_that_may_not_be_read(tmp_path, monkeypatch, owner, call):
    """In a folder that may not be read, and a file; the tests may run as root, who reads all."""

    def refuse(*args, **settings):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "vgg.pth", good())
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, refuse)
        with pytest.raises(UserError, match="cannot be read: permission denied"):
            PerceptualLoss(path)


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
