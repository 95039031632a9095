"""The training scripts run in the tests' own process here, as starting torch takes seconds."""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # a worker a core, each with one thread: threads that wait for each other waste both cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


from common import cli


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No wandb unless asked for; signal handlers are put back; a dry run may take more than its
    two epochs."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(cli.DRY_RUN, "epochs", 9)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)
