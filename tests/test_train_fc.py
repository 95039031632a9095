"""train_fc.py as a user runs it: output files, resume and errors."""

import json
import signal
import subprocess
import sys

import pytest
import torch

import train_fc
from common import UserError, checkpoints, figures
from common import run as run_module
from common.early_stopping import EarlyStopping
from common.models import FullyConnected
from tests.runs import (
    ROOT,
    SMALL,
    assert_equal_runs,
    history,
    interrupt_at,
    quiet_environment,
    refused,
    run_script,
    same,
)

DOCUMENTED = {"best.pt", "last.pt", "history.jsonl", "metrics.json", "loss.png", "samples.png"}


def run(*args, code=0):
    run_script(train_fc, *args, code=code)


def test_run_writes_documented_files(finished, tmp_path):
    """In a process of its own, with the same bits as in another."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train_fc.py"), *SMALL, "--out", str(out)]
    done = subprocess.run(
        command, env=quiet_environment(), capture_output=True, text=True, check=True
    )
    assert "it/s" not in done.stderr  # no progress bar without a terminal
    text = done.stdout
    assert {path.name for path in out.iterdir()} == DOCUMENTED
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"epoch", "train_loss", "val_loss", "seconds", "lr"} <= lines[0].keys()
    result = json.loads((out / "metrics.json").read_text())
    sizes = {"train": 288, "val": 32, "test": 320}
    assert result["data"] == {"name": "synthetic", "test_name": "synthetic", **sizes}
    keys = ["mse", "psnr", "accuracy_0.95", "accuracy_0.99", "min_cosine", "max_abs_error"]
    assert all(list(result[column]) == keys for column in ("test", "floor", "ceiling"))
    assert result["script"] == "train_fc.py"
    assert result["epochs"] == 2
    assert result["stopped_early"] is False
    for name in ("best.pt", "last.pt"):
        state = torch.load(out / name, weights_only=True)
        FullyConnected().load_state_dict(state["model"])
    assert sum(line.startswith("epoch:") for line in text.splitlines()) == 2
    assert "floor" in text
    assert "ceiling" in text
    for name in ("loss.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert_equal_runs(out, finished)


def test_resume_between_epochs_is_bit_identical(finished, tmp_path):
    run(*SMALL, "--epochs", 1, "--out", tmp_path)
    run(*SMALL, "--epochs", 2, "--out", tmp_path, "--resume")
    assert_equal_runs(tmp_path, finished)


# an epoch has nine steps
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 9), (signal.SIGINT, 13)]
)
def test_resume_within_an_epoch_is_bit_identical(
    finished, tmp_path, monkeypatch, capsys, number, step
):
    begun = interrupt_at(monkeypatch, step, number)
    run(*SMALL, "--epochs", 2, "--out", tmp_path, code=128 + number)
    assert len(begun) == step  # the step was completed and no other started
    assert "--resume" in capsys.readouterr().err
    run(*SMALL, "--epochs", 2, "--out", tmp_path, "--resume")
    assert_equal_runs(tmp_path, finished)


def test_best_weights_are_kept_without_early_stopping(tmp_path):
    # at this rate the last epoch is not the best one
    run(*SMALL, "--epochs", 6, "--lr", 0.05, "--out", tmp_path)
    losses = [line["val_loss"] for line in history(tmp_path)]
    best = losses.index(min(losses)) + 1
    assert best < 6
    state = torch.load(tmp_path / "best.pt")
    assert (
        state["epoch"] == best == json.loads((tmp_path / "metrics.json").read_text())["best_epoch"]
    )
    assert not same(state["model"], torch.load(tmp_path / "last.pt")["model"])


def test_early_stopping_ends_the_run(tmp_path):
    flags = [*SMALL, "--epochs", 9, "--patience", 2, "--min-delta", 1, "--out", tmp_path]
    run(*flags)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert (result["epochs"], result["stopped_early"]) == (3, True)
    run(*flags, "--resume")
    assert len(history(tmp_path)) == 3  # a stopped run does not continue


def test_closed_form_without_training(tmp_path):
    run(*SMALL, "--init", "closed-form", "--epochs", 0, "--out", tmp_path)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["epochs"] == 0
    assert result["test"]["accuracy_0.95"] > result["floor"]["accuracy_0.95"] + 0.2
    assert {path.name for path in tmp_path.iterdir()} == DOCUMENTED - {"loss.png"}


@pytest.mark.parametrize("model", ["linear", "separable"])
def test_every_model_runs_and_resumes(tmp_path, model):
    flags = [*SMALL, "--model", model]
    run(*flags, "--epochs", 2, "--out", tmp_path / "whole")
    for epochs, resume in ((1, []), (2, ["--resume"])):
        run(*flags, "--epochs", epochs, "--out", tmp_path / "resumed", *resume)
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("model", ["linear", "separable"])
def test_closed_form_is_the_chain(tmp_path, model):
    run(*SMALL, "--model", model, "--init", "closed-form", "--epochs", 0, "--out", tmp_path)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["test"]["accuracy_0.99"] == 1
    assert result["test"]["max_abs_error"] < 1e-5


def test_separable_becomes_the_chain_from_random_weights(tmp_path):
    flags = ["--data", "synthetic", "--train-size", 2000, "--model", "separable"]
    run(*flags, "--batch-size", 8, "--out", tmp_path)  # 1,350 steps
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["test"]["mse"] < 1e-10


def test_closed_form_says_how_many_images_it_needs(capsys, tmp_path):
    flags = ["--model", "separable", "--init", "closed-form", "--train-size", "4"]
    err = refused(capsys, train_fc, "--data", "synthetic", *flags, "--out", tmp_path)
    assert "needs 12 training images, better 16, not 3" in err


def test_checkpoint_of_another_model_is_refused(capsys, finished, tmp_path):
    (tmp_path / "last.pt").write_bytes((finished / "last.pt").read_bytes())
    err = refused(capsys, train_fc, *SMALL, "--model", "separable", "--out", tmp_path, "--resume")
    assert "is of another model than Separable" in err


def test_each_model_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(*SMALL, "--model", "separable", "--init", "closed-form", "--epochs", 0)
    out = tmp_path / "runs/fc-separable-closed-form-synthetic-dry-run"
    assert (out / "metrics.json").exists()


def test_offline_wandb_logs(tmp_path):
    pytest.importorskip("wandb")
    run(*SMALL, "--epochs", 1, "--wandb", "offline", "--out", tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("fault", ["missing", "broken", "breaks later"])
def test_wandb_never_ends_a_run(tmp_path, monkeypatch, capsys, fault):
    class Broken:
        Settings = dict

        @staticmethod
        def init(**settings):
            if fault == "breaks later":
                return Broken()
            raise RuntimeError("no")

        def log(self, *args, **settings):
            raise RuntimeError("no")

    monkeypatch.setitem(sys.modules, "wandb", None if fault == "missing" else Broken)
    run(*SMALL, "--epochs", 1, "--wandb", "offline", "--out", tmp_path)
    assert capsys.readouterr().err.count("wandb is off") == 1
    assert {path.name for path in tmp_path.iterdir()} == DOCUMENTED


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr: nan is not a number"),
        (["--lr", "inf"], "--lr: inf is too large"),
        (["--min-delta", "nan"], "--min-delta: nan is not a number"),
        *(([flag, "1" + 30 * "0"], "too large") for flag in ("--seed", "--train-size", "--epochs")),
        (["--out", ""], "--out: the path is empty"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--lr", "0"], "--lr"),
        (["--epochs", "-3"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--train-size", "1"], "--train-size"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device"),
        (["--patience", "0"], "--patience"),
        (["--resume"], "--resume"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "/nowhere"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_invalid_flags_exit_2_with_one_line(capsys, tmp_path, flags, words):
    err = refused(capsys, train_fc, *SMALL, "--out", tmp_path, *flags)
    assert words in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys, tmp_path):
    err = refused(capsys, train_fc, *SMALL, "--device", "cuda", "--out", tmp_path)
    assert "--device cpu" in err


def test_unwritable_out_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    err = refused(capsys, train_fc, *SMALL, "--out", tmp_path / "file" / "run")
    assert "--out" in err


@pytest.mark.parametrize("fault", ["cut", "other model", "not a checkpoint", "other seed"])
def test_resume_refuses_and_keeps_other_checkpoints(capsys, finished, tmp_path, fault):
    last = tmp_path / "last.pt"
    content = (finished / "last.pt").read_bytes()
    last.write_bytes(content[: len(content) // 2] if fault == "cut" else content)
    if fault == "other model":
        torch.save(torch.load(last) | {"model": {"weight": torch.zeros(1)}}, last)
    if fault == "not a checkpoint":
        torch.save([1, 2], last)
    seed = ["--seed", "1"] if fault == "other seed" else []
    before = last.read_bytes()
    err = refused(capsys, train_fc, *SMALL, "--epochs", 2, "--out", tmp_path, "--resume", *seed)
    assert ("--seed 0" if fault == "other seed" else str(last)) in err
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert last.read_bytes() == before


@pytest.mark.parametrize("save_every", [run_module.SAVE_EVERY, 0], ids=["epoch", "step"])
def test_diverged_run_keeps_the_last_finite_checkpoint(
    monkeypatch, capsys, finished, tmp_path, save_every
):
    monkeypatch.setattr(run_module, "SAVE_EVERY", save_every)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr(
        torch.nn.functional, "mse_loss", lambda *args, **kw: args[0].sum() * torch.nan
    )
    err = refused(capsys, train_fc, *SMALL, "--epochs", 4, "--out", tmp_path, "--resume")
    assert "no longer finite" in err
    for name in ("last.pt", "best.pt"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        checkpoints.write(path, half)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("last.pt", b"old")]


def test_loss_curve_marks_best_epoch_and_early_stop(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "save", lambda figure, path: shown.append(figure))
    stopping = EarlyStopping(patience=1)
    losses = [0.3, 0.1, 0.2]
    stops = [stopping.step(loss) for loss in losses]
    lines = [{"epoch": i, "train_loss": x, "val_loss": x} for i, x in enumerate(losses, 1)]
    figures.loss_curve(tmp_path / "x", lines, stopping.best_epoch, stops[-1], "title")
    axes = shown[0].axes[0]
    assert axes.get_yscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training", "validation", "kept: epoch 2", "early stop: epoch 3"]
