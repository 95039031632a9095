"""Where the operator's library comes from: built, stale, broken, without a compiler or CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import _build
from common.transforms import fused_transform

ROOT = Path(__file__).resolve().parent.parent
CALL = "import torch; from common.transforms import fused_transform as f; f(torch.zeros(3, 4, 4))"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the sources, not built."""
    for part in ("common", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    shutil.copy(ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(_build, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """Counts builds, each of which leaves an empty file in the place of a library."""
    made = []

    def run(command, cwd, **options):
        made.append(command)
        (cwd / "common" / f"{_build.library_name()}.so").touch()

    monkeypatch.setattr(_build.subprocess, "run", run)
    return made


def test_builds_once_and_says_so(checkout, builds, capsys):
    path = _build.library()
    assert path.exists()
    assert path == _build.library()
    assert len(builds) == 1
    said = capsys.readouterr().err
    assert "not built yet" in said
    assert _build.COMMAND in said


def test_a_stale_library_is_replaced(checkout, builds, capsys):
    old = _build.library()
    with open(checkout / "csrc" / "fused.h", "a") as source:
        source.write("// changed\n")
    new = _build.library()
    assert new != old
    assert new.exists()
    assert not old.exists()
    assert len(builds) == 2
    assert "sources have changed" in capsys.readouterr().err


def test_installed_without_sources(checkout, builds):
    path = _build.library()
    shutil.rmtree(checkout / "csrc")
    assert _build.library() == path
    path.unlink()
    with pytest.raises(RuntimeError, match=_build.COMMAND):
        _build.library()
    assert len(builds) == 1


def test_without_a_compiler(checkout):
    environment = {**os.environ, "CXX": "/nowhere/c++", "CC": "/nowhere/cc", "FORCE_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CALL], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "RuntimeError: The fused operator is not built, and building it failed" in done.stderr
    assert _build.COMMAND in done.stderr
    assert "/nowhere/c++" in done.stderr


def test_where_nothing_can_be_written(checkout, monkeypatch):
    monkeypatch.setattr(_build.Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError("ro")))
    with pytest.raises(RuntimeError, match="building it failed"):
        _build.library()


def test_a_library_that_cannot_be_loaded(checkout):
    path = checkout / "common" / f"{_build.library_name()}.so"
    path.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-c", CALL], cwd=checkout, capture_output=True, text=True
    )
    assert f"{path} cannot be loaded: delete it and run {_build.COMMAND}" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible, CUDA is built")
def test_without_cuda():
    fused_transform(torch.zeros(3, 4, 4))
    op = "fused_transform::infer"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        pytest.skip("built with FORCE_CUDA=1")
    # a kernel that is missing, as CUDA's is, is named with the command that builds it
    with pytest.raises(RuntimeError, match=f"FORCE_CUDA=1 {_build.COMMAND}"):
        fused_transform(torch.zeros(3, 4, 4).to_sparse())
