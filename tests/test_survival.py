"""Fault tolerance: several ranks, kills at any moment, full disks, damaged files, a second run in
the same folder. No state is lost, nothing hangs, and an error is one line."""

import fcntl
import io
import logging
import os
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import train_cnn
import train_fc
from common import UserError, checkpoints, run
from common.models import ConvNet
from tests.runs import (
    ROOT,
    SMALL,
    assert_close_runs,
    assert_equal_runs,
    history,
    quiet_environment,
    refused,
    run_script,
    same,
    start_ranks,
)

# 288 training images: nine batches of 31 and one of 9, none of which splits evenly over two ranks
ODD = [*SMALL, "--batch-size", 31]
# the last of the three batches is one image, so one of the ranks has none
LAST_ALONE = [*SMALL, "--train-size", 36, "--batch-size", 16]
PERCEPTUAL = ["--perceptual", "--vgg-weights", "random", "--vgg-size", 32]
RUN = "import train_{0}; from common import cli; cli.run(train_{0}.main)"
# A signal to the second rank only, and no dropout.
RANK = """
import os, sys, pytest
from tests.runs import interrupt_at
from common.models import ConvNet
patch = pytest.MonkeyPatch()
ConvNet.train = lambda self, mode=True: super(ConvNet, self).train(False)
if os.environ["RANK"] == "1":
    interrupt_at(patch, step={}, number={})
sys.argv[0] = "train.py"
"""


# --- several ranks -------------------------------------------------------------------------------


def test_two_ranks_match_one_process_and_stop_together(tmp_path):
    flags = [*ODD, "--epochs", 2, "--out", tmp_path / "two"]
    code = RANK.format(13, signal.SIGTERM) + RUN.format("fc")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    command = [sys.executable, *torchrun, sys.executable, "-c", code, *map(str, flags)]
    environment = quiet_environment()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0  # torchrun reports that its ranks ended early
    assert done.stdout.count("epoch:1") == 1  # only the first rank prints
    assert done.stderr.count("--resume") == 1
    state = torch.load(tmp_path / "two" / "last.pt")
    assert (len(state["history"]), state["step"]) == (1, 3)  # of ten steps per epoch
    run_script(train_fc, *flags, "--resume")
    run_script(train_fc, *ODD, "--epochs", 2, "--out", tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


def test_killed_rank_ends_the_others_and_one_process_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(ConvNet, "train", lambda self, mode=True: nn.Module.train(self, False))
    flags = [*LAST_ALONE, *PERCEPTUAL, "--epochs", 2]
    code = RANK.format(5, signal.SIGKILL) + RUN.format("cnn")
    both = start_ranks(code, *flags, "--out", tmp_path / "two")
    ends = [(each.communicate(), each.returncode) for each in both]
    assert [code for _, code in ends] == [1, -signal.SIGKILL]
    err = ends[0][0][1]
    assert "another process ended" in err
    assert "imed out" not in err  # noticed by the closed connection
    assert "--resume" in err
    assert "Traceback" not in err
    monkeypatch.setattr(train_cnn, "write_report", lambda *args: None)  # most of the time
    run_script(train_cnn, *flags, "--out", tmp_path / "two", "--resume")
    run_script(train_cnn, *flags, "--out", tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "two")


# --- killed at any moment ------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates SIGKILL: no except clause of the scripts catches it."""


def killed(monkeypatch, module, name, moment, *args):
    """Runs the script until call number `moment` of module.name, which raises Killed."""
    calls, real = [], getattr(module, name)

    def dies(*arguments, **settings):
        calls.append(1)
        if len(calls) == moment:
            raise Killed
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies)
        with pytest.raises(Killed):
            run_script(train_fc, *args)


@pytest.mark.parametrize("moment", range(2, 7))  # six files are written in two epochs
def test_resume_after_kill_during_save_is_bit_identical(finished, tmp_path, monkeypatch, moment):
    flags = [*SMALL, "--epochs", 2, "--out", tmp_path]
    killed(monkeypatch, os, "replace", moment, *flags)
    assert list(tmp_path.glob(".*.tmp"))
    run_script(train_fc, *flags, *(["--resume"] if moment > 3 else []))
    assert_equal_runs(tmp_path, finished)
    assert not list(tmp_path.glob(".*"))


def test_resume_after_kill_within_a_long_epoch_is_bit_identical(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    flags = [*SMALL, "--epochs", 2, "--out", tmp_path]
    killed(monkeypatch, nn.functional, "mse_loss", 7, *flags)
    assert torch.load(tmp_path / "last.pt")["step"] == 6
    run_script(train_fc, *flags, "--resume")
    assert_equal_runs(tmp_path, finished)


def test_signal_during_last_validation_saves_and_exits(finished, tmp_path, monkeypatch):
    real = train_fc.evaluate

    def evaluate(*args):
        if (tmp_path / "last.pt").exists():  # after the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_fc, "evaluate", evaluate)
    run_script(train_fc, *SMALL, "--epochs", 2, "--out", tmp_path, code=143)
    assert_equal_runs(tmp_path, finished)
    assert not (tmp_path / "metrics.json").exists()


def test_resume_restores_truncated_history_from_last_pt(finished, copy):
    text = (copy / "history.jsonl").read_text()
    (copy / "history.jsonl").write_text(text[:-40])
    (copy / ".last.pt.tmp").write_bytes(b"half")
    (copy / ".mine.tmp").write_bytes(b"a user's")
    run_script(train_fc, *SMALL, "--epochs", 2, "--out", copy, "--resume")
    assert (copy / "history.jsonl").read_text() == text
    assert not (copy / ".last.pt.tmp").exists()
    assert (copy / ".mine.tmp").exists()


# --- the folder ----------------------------------------------------------------------------------


def test_second_run_in_a_locked_folder_is_refused(tmp_path, capsys):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert "another run" in refused(capsys, train_fc, *SMALL, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []
    os.close(holder)
    run_script(train_fc, *SMALL, "--epochs", 0, "--out", tmp_path)


def test_lock_of_a_killed_process_is_released(tmp_path):
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    checkpoints.lock(tmp_path)
    checkpoints.unlock()


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", flock)
    run_script(train_fc, *SMALL, "--epochs", 0, "--out", tmp_path)
    assert "cannot be locked" in capsys.readouterr().err


def test_full_disk_loses_only_the_current_epoch(copy, capsys):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        err = refused(capsys, train_fc, *SMALL, "--epochs", 3, "--out", copy, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in err
    ends_with = set(run.ENDS_WITH)  # results of the previous end, removed by the resume
    kept = {name: content for name, content in before.items() if name not in ends_with}
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == kept
    run_script(train_fc, *SMALL, "--epochs", 3, "--out", copy, "--resume")
    assert len(history(copy)) == 3


def test_read_only_folder_exits_2_with_one_line(tmp_path, monkeypatch, capsys):
    real = open

    def read_only(path, mode="r", *args, **settings):
        if "w" in mode and str(path).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system")
        return real(path, mode, *args, **settings)

    monkeypatch.setattr(checkpoints, "open", read_only, raising=False)
    monkeypatch.setattr(checkpoints.Path, "unlink", lambda path, **settings: read_only(path, "w"))
    assert "Read-only" in refused(capsys, train_fc, *SMALL, "--epochs", 1, "--out", tmp_path)


# --- damaged checkpoints -------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(7, 9)
    saved = {"model": net.state_dict(), "history": [{"epoch": 1}], "random": torch.get_rng_state()}
    path = tmp_path / "last.pt"
    checkpoints.write(path, lambda file: torch.save(saved, file))
    return path, net, saved


def test_truncated_checkpoint_is_refused(checkpoint):
    path, net, _ = checkpoint
    content = path.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 50):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=str(path)):
            checkpoints.load_checkpoint(path, net)


def test_corrupted_checkpoint_is_refused_or_loads_unchanged(checkpoint):
    path, net, saved = checkpoint
    content, numbers, refusals = path.read_bytes(), random.Random(0), 0
    for place in numbers.sample(range(len(content)), 200):
        altered = bytearray(content)
        altered[place] ^= numbers.randrange(1, 256)
        path.write_bytes(altered)
        try:
            assert same(dict(checkpoints.load_checkpoint(path, net)), saved)  # an unread byte
        except UserError:
            refusals += 1
    assert refusals > 100


def test_zip_entry_marked_as_a_folder_is_read(tmp_path):
    path, net = tmp_path / "last.pt", nn.Linear(3000, 1000)  # 12 MB are newly allocated memory
    saved = {"model": net.state_dict()}
    torch.save(saved, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"last/data/0") - 8] |= 0x10  # the attributes in the central directory
    path.write_bytes(content)
    other = nn.Linear(3000, 1000)
    checkpoints.load_checkpoint(path, other)  # torch.load alone would return uninitialised memory
    assert same({"model": other.state_dict()}, saved)


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "history", "random", "args"])
@pytest.mark.parametrize("value", [None, 3, {"a": 1}], ids=str)
def test_checkpoint_with_wrong_types_is_refused(capsys, copy, key, value):
    path = copy / "last.pt"
    torch.save(torch.load(path) | {key: value}, path)
    err = refused(capsys, train_fc, *SMALL, "--epochs", 3, "--out", copy, "--resume")
    assert f"{path} is not a checkpoint of this version" in err


@pytest.mark.parametrize("content", [None, 3, [1], torch.zeros(3), {"model": {1: 2}}], ids=repr)
@pytest.mark.filterwarnings("error")
def test_file_without_a_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "last.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=str(path)):
        checkpoints.load_checkpoint(path, nn.Linear(2, 3))


def test_resume_with_other_data_is_refused(capsys, copy, tmp_path, monkeypatch):
    path = copy / "last.pt"
    state = torch.load(path)
    torch.save(state | {"args": state["args"] | {"data": "cifar10"}}, path)
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "auto", "--data-dir", "data", "--epochs", 3]
    run_script(train_fc, *SMALL, *flags, "--out", copy, "--resume", code=2)
    assert "--data cifar10, not synthetic" in capsys.readouterr().err


# --- other errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in a step", "in the data"])
def test_out_of_memory_suggests_a_smaller_batch(capsys, tmp_path, monkeypatch, where):
    module, name = (nn.functional, "mse_loss") if where == "in a step" else (train_fc, "load_data")
    monkeypatch.setattr(module, name, lambda *args, **settings: torch.empty(1 << 50))
    assert "--batch-size 16" in refused(capsys, train_fc, *SMALL, "--out", tmp_path)


def test_resumed_run_keeps_its_wandb_id(tmp_path, monkeypatch):
    begun = []

    class Recorder:
        Settings = dict

        @staticmethod
        def init(**settings):
            begun.append(settings)

    monkeypatch.setitem(sys.modules, "wandb", Recorder)
    flags = [*SMALL, "--wandb", "offline", "--out", tmp_path]
    run_script(train_fc, *flags, "--epochs", 1)
    run_script(train_fc, *flags, "--epochs", 2, "--resume")
    run_script(train_fc, *flags, "--epochs", 1, "--overwrite")
    first, resumed, other = (settings["id"] for settings in begun)
    assert first == resumed != other
    assert all(settings["resume"] == "allow" for settings in begun)


def test_wandb_on_a_full_disk_prints_no_traceback(tmp_path, monkeypatch, capsys):
    class Full:
        Settings = dict

        @staticmethod
        def init(**settings):
            handler = logging.FileHandler("/dev/full")
            handler.handle(logging.LogRecord("wandb", 40, "", 0, "a line", None, None))
            handler.stream = io.StringIO()  # closes without its own error

    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setitem(sys.modules, "wandb", Full)
    run_script(train_fc, *SMALL, "--epochs", 0, "--wandb", "offline", "--out", tmp_path)
    assert capsys.readouterr().err == ""


def test_folder_name_that_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    run_script(train_fc, *SMALL, "--epochs", "0", "--out", f"{tmp_path}/\udcff")


def test_sigint_before_training_exits_without_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_fc, "load_data", lambda *args, **settings: os.kill(os.getpid(), 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_script(train_fc, *SMALL, "--out", tmp_path, code=130)
    assert "Traceback" not in capsys.readouterr().err
