"""The command line of the training scripts: folders, flags, signals, streams and environment
variables. No result of a run is lost, and an error is one line."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import train_cnn
import train_fc
from common import cli
from tests.runs import (
    ROOT,
    SMALL,
    assert_equal_runs,
    history,
    interrupt_at,
    quiet_environment,
    refused,
    run_script,
)

# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "out"),
    [
        (train_fc, [], "runs/fc"),
        (train_fc, ["--data", "cifar10", "--seed", "3"], "runs/fc"),
        (train_fc, ["--init", "closed-form", "--epochs", "0"], "runs/fc-closed-form"),
        (train_fc, ["--data", "synthetic"], "runs/fc-synthetic"),
        (train_fc, ["--stop-rule", "window"], "runs/fc-window"),
        (train_cnn, [], "runs/cnn"),
        (train_cnn, ["--flip", "fixed"], "runs/cnn-fixed"),
        (train_cnn, ["--perceptual", "--precision", "bf16"], "runs/cnn-perceptual-bf16"),
        (train_cnn, ["--dry-run"], "runs/cnn-dry-run"),
        (train_fc, ["--data-dir", "data"], "runs/fc-synthetic"),  # holds no CIFAR-10
        (train_fc, ["--data-dir", "data", "--dry-run"], "runs/fc-synthetic-dry-run"),
    ],
)
def test_each_variant_has_its_own_default_folder(script, flags, out, monkeypatch, tmp_path):
    class Parsed(Exception):
        pass

    def stop(args):
        raise Parsed(args.out)

    (tmp_path / "cifar10/cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("DATA_DIR", "cifar10")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.distributed, "init", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(Parsed, match=f"^{out}$"):
        script.main()


def test_run_is_replaced_only_with_overwrite(copy, capsys):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    err = refused(capsys, train_fc, *SMALL, "--epochs", 2, "--out", copy)
    assert f"--epochs 2 --out {copy} --resume" in err
    assert "--overwrite" in err
    err = refused(capsys, train_fc, *SMALL, "--seed", 1, "--out", copy)  # --resume would refuse it
    assert f"{copy} had --seed 0, not 1: name another folder with --out, or replace" in err
    assert "--resume" not in err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    run_script(train_fc, *SMALL, "--seed", 1, "--epochs", 1, "--out", copy, "--overwrite")
    assert torch.load(copy / "last.pt")["args"]["seed"] == 1


def test_batch_size_beyond_the_images_and_auto_are_no_other_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--train-size", 20, "--epochs", 0, "--data-dir", "data"]  # 18 images, batches of 100
    run_script(train_fc, *flags)
    assert capsys.readouterr().err.count("synthetic images instead") == 1
    run_script(train_fc, *flags, code=2)
    assert "runs/fc-synthetic holds a run; resume it" in capsys.readouterr().err


def test_cnn_with_other_epochs_is_not_told_to_resume(tmp_path, capsys):
    run_script(train_cnn, *SMALL, "--train-size", 20, "--epochs", 0, "--out", tmp_path)
    flags = [*SMALL, "--train-size", 20, "--epochs", 1, "--out", tmp_path]
    assert "had --epochs 0, not 1" in refused(capsys, train_cnn, *flags)


def test_dry_run_in_its_default_folder_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run_script(train_fc, *SMALL, "--epochs", 0)


def test_resume_auto_starts_and_resumes(tmp_path, monkeypatch):
    flags = [*SMALL, "--epochs", 2, "--resume", "auto", "--out"]
    run_script(train_fc, *flags, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12, signal.SIGTERM)
        run_script(train_fc, *flags, tmp_path / "cut", code=143)
    run_script(train_fc, *flags, tmp_path / "cut")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_removes_results_of_the_previous_end(copy, monkeypatch):
    assert (copy / "metrics.json").exists()
    interrupt_at(monkeypatch, 3, signal.SIGTERM)
    flags = [*SMALL, "--epochs", 3, "--out", copy]
    run_script(train_fc, *flags, "--resume", code=143)
    assert sorted(path.name for path in copy.iterdir()) == ["best.pt", "history.jsonl", "last.pt"]


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"]], ids=str)
def test_complete_run_without_last_pt_is_kept(copy, capsys, flags):
    (copy / "last.pt").unlink()
    best = (copy / "best.pt").read_bytes()
    flags = [*SMALL, "--epochs", 0, "--out", copy, *flags]
    assert "--overwrite" in refused(capsys, train_fc, *flags)
    assert (copy / "best.pt").read_bytes() == best
    (copy / "metrics.json").unlink()  # as after a kill between the first two saves
    run_script(train_fc, *flags)
    assert (copy / "last.pt").exists()


def test_resume_without_a_complete_epoch_needs_one(capsys, monkeypatch, tmp_path):
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    run_script(train_fc, *SMALL, "--epochs", 1, "--out", tmp_path / "cut", code=143)
    capsys.readouterr()
    flags = [*SMALL, "--epochs", 0, "--out", tmp_path / "cut", "--resume"]
    assert "holds no complete epoch; resume with more" in refused(capsys, train_fc, *flags)


@pytest.mark.parametrize("fault", ["missing", "of another run"])
def test_resume_checks_best_pt_before_training(copy, tmp_path, capsys, fault):
    best = copy / "best.pt"
    if fault == "missing":
        best.unlink()
    else:
        torch.save(torch.load(best) | {"wandb": "00000000"}, best)
    before = (copy / "last.pt").read_bytes()
    assert fault in refused(capsys, train_fc, *SMALL, "--epochs", 3, "--out", copy, "--resume")
    assert (copy / "last.pt").read_bytes() == before


def test_tilde_in_paths_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_script(train_fc, *SMALL, "--epochs", 0, "--out=~/run")
    assert (tmp_path / "run" / "last.pt").exists()
    monkeypatch.setenv("DATA_DIR", "~/sub/data")
    assert f"{tmp_path}/sub/data" in refused(capsys, train_fc, "--dry-run", "--out=~/other")
    flags = [*SMALL, "--perceptual", "--vgg-weights=~/vgg.pth", "--out=~/third"]
    assert f"{tmp_path}/vgg.pth" in refused(capsys, train_cnn, *flags)


# --- signals, streams, variables -----------------------------------------------------------------


def test_sighup_saves_and_exits(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 3, signal.SIGHUP)
    run_script(train_fc, *SMALL, "--out", tmp_path, code=128 + signal.SIGHUP)
    assert torch.load(tmp_path / "last.pt")["step"] == 3


def test_ignored_sighup_stays_ignored(tmp_path, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 3, signal.SIGHUP)
        run_script(train_fc, *SMALL, "--epochs", 1, "--out", tmp_path)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_run_completes_with_closed_stdout_and_full_stderr(tmp_path):
    """Also with the matplotlib backend of a notebook: one subprocess for all, as each takes
    seconds."""
    environment = quiet_environment(MPLBACKEND="module://matplotlib_inline.backend_inline")
    command = [sys.executable, "train_fc.py", *SMALL, "--epochs", "1", "--out", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)  # as after `| head -0`
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=full)
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert len(history(tmp_path)) == 1


def test_stream_drops_output_that_cannot_be_written():
    class Broken:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise ValueError("I/O operation on closed file")

        def fileno(self):
            raise OSError

    stream = cli.Stream(Broken())
    assert stream.write("text") == 4
    stream.flush()
    files = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for _ in range(3):
        cli.Stream(None).write("text")
        stream.write("text")
    assert not files or len(os.listdir("/proc/self/fd")) == len(files)  # none is left open


def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path):
    """A fake torch module sends the signal during its import."""
    (tmp_path / "torch.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")

    def default_sigint():  # a shell starts a process in the background with it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for script in ("train_fc.py", "train_cnn.py", "bench.py"):
        (tmp_path / script).write_text((ROOT / script).read_text())
        command = [sys.executable, str(tmp_path / script)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, preexec_fn=default_sigint
        )
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "settings",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": ""},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    ],
    ids=str,
)
def test_incomplete_torchrun_environment_is_refused(tmp_path, capsys, monkeypatch, settings):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(capsys, train_fc, *SMALL, "--out", tmp_path)


# --- numbers -------------------------------------------------------------------------------------


def test_batch_size_is_limited_to_the_training_images(tmp_path):
    run_script(
        train_fc, "--data", "synthetic", "--train-size", 20, "--epochs", 0, "--out", tmp_path
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["args"]["batch_size"] == 18


def test_help_shows_the_defaults_of_the_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_fc.py", "--model", "separable", "--help"])
    with pytest.raises(SystemExit):
        train_fc.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "--epochs EPOCHS at most; default: 6 --batch-size BATCH_SIZE default: 32" in shown


@pytest.mark.parametrize("factor", [1, 20])
def test_slow_bfloat16_is_reported_with_its_factor(tmp_path, capsys, monkeypatch, factor):
    times = iter([[2.0, 1.0], [2.0 * factor, 1.0 * factor]])
    monkeypatch.setattr(cli.timeit, "repeat", lambda *args, **settings: next(times))
    flags = [*SMALL, "--epochs", 0, "--precision", "bf16", "--out", tmp_path]
    run_script(train_fc, *flags)
    err = capsys.readouterr().err
    assert err.count("bf16 is 20 times slower than fp32") == (factor > 1)
