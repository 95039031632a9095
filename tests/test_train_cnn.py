"""train_cnn.py as a user runs it, with both losses."""

import json
import signal

import pytest
import torch

import train_cnn
from common import cli
from common.models import ConvNet
from tests.runs import SMALL, assert_equal_runs, history, interrupt_at, refused, run_script

TINY = [*SMALL, "--batch-size", "16"]
RANDOM = ["--perceptual", "--vgg-weights", "random"]
TERMS = {"mse", "vgg2", "vgg7", "vgg14", "vgg21", "vgg28"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setitem(cli.DRY_RUN, "train_size", 40)


def run(*args, code=0):
    run_script(train_cnn, *args, code=code)


# five training images, three steps an epoch as well: emulated bfloat16 is slow
BF16 = ["--precision", "bf16", "--train-size", "6", "--batch-size", "2"]


@pytest.mark.parametrize("flags", [[], RANDOM, BF16], ids=" ".join)
def test_resume_within_an_epoch_is_bit_identical(tmp_path, monkeypatch, flags):
    two = [*TINY, *flags, "--epochs", 2]
    run(*two, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGINT)  # an epoch has three steps
        run(*two, "--out", tmp_path / "cut", code=130)
    run(*two, "--out", tmp_path / "cut", "--resume")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    rates = [line["lr"] for line in history(tmp_path / "whole")]
    assert rates == pytest.approx([1e-3 * 4 / 6, 1e-3 / 6])  # linear decay to zero


def test_resume_with_other_epochs_is_refused(tmp_path, capsys):
    run(*TINY, "--epochs", 1, "--out", tmp_path)
    capsys.readouterr()
    err = refused(capsys, train_cnn, *TINY, "--epochs", 2, "--out", tmp_path, "--resume")
    assert "--epochs 1, not 2" in err


def test_history_has_the_terms_of_the_perceptual_loss(tmp_path):
    run(*TINY, *RANDOM, "--epochs", 1, "--out", tmp_path)
    (line,) = history(tmp_path)
    for split in ("train", "val"):
        terms = [line[f"{split}_{name}"] for name in TERMS]
        assert line[f"{split}_loss"] == pytest.approx(sum(terms), rel=1e-4)
    weights = torch.load(tmp_path / "best.pt")["model"]
    assert weights.keys() == ConvNet().state_dict().keys()  # without the VGG
    assert json.loads((tmp_path / "metrics.json").read_text())["args"]["vgg_weights"] == "random"


def test_compare_evaluates_the_other_checkpoint(tmp_path):
    run(*TINY, "--flip", "fixed", "--epochs", 1, "--out", tmp_path / "mse")
    best = tmp_path / "mse" / "best.pt"
    run(*TINY, *RANDOM, "--epochs", 0, "--out", tmp_path / "perceptual", "--compare", best)
    result = json.loads((tmp_path / "perceptual" / "metrics.json").read_text())
    first = json.loads((tmp_path / "mse" / "metrics.json").read_text())
    other = result["others"]["mse"]  # with its own --flip
    assert {key: other[key] for key in first["test"]} == pytest.approx(first["test"])
    assert other["terms"].keys() == {"loss", *TERMS}
    torch.save({"model": ConvNet().state_dict()}, best)  # without the flags
    run(*TINY, "--epochs", 0, "--out", tmp_path / "cnn", "--compare", best)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vgg-size", "31"], "--vgg-size"),
        (["--vgg-weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--flip", "both"], "--flip"),
        (["--compare", "/nowhere.pt"], "/nowhere.pt"),
    ],
)
def test_invalid_flags_exit_2_with_one_line(tmp_path, capsys, flags, words):
    assert words in refused(capsys, train_cnn, *TINY, "--perceptual", *flags, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []
