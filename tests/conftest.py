"""Fixtures. The tests run the training scripts in their own process, as importing torch takes
seconds."""

import os
import shutil
import signal

import pytest

# before torch is imported: one worker per core with one thread, as threads that wait for each other
# waste both cores; and as in the processes that the tests start, whose bits are compared
os.environ["OMP_NUM_THREADS"] = "1"

import train_fc
from common import cli
from tests.runs import SMALL, run_script


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No wandb unless asked for; signal handlers are restored; a dry run may take more than two
    epochs."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(cli.DRY_RUN, "epochs", 9)
    # a shell starts a process in the background with SIGINT ignored
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours[signal.SIGHUP] = signal.SIG_DFL
    handlers = [(number, signal.signal(number, ours[number])) for number in ours]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run of train_fc.py with two epochs; read only."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        run_script(train_fc, *SMALL, "--epochs", 2, "--out", out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run's folder."""
    return shutil.copytree(finished, tmp_path / "copy")
