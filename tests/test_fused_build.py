"""Where the operator's library comes from: built, stale, broken, without a compiler or CUDA."""

import shutil
import subprocess
import sys

import pytest
import torch

from common.fused import _build, fused_transform
from tests.runs import ROOT

CALL = "import torch; from common.fused import fused_transform as f; f(torch.zeros(3, 4, 4))"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the sources, not built."""
    for part in ("common", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(_build, "ROOT", tmp_path)
    monkeypatch.setattr(_build, "HERE", tmp_path / "common" / "fused")
    monkeypatch.setattr(_build, "_failed", None)
    return tmp_path


@pytest.fixture
def builds(monkeypatch):
    """Counts builds, each of which leaves an empty file in the place of a library."""
    made = []

    def run(command, cwd, **options):
        made.append(command)
        (cwd / "common" / "fused" / f"{_build.library_name(False)}.so").touch()

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
    assert _build.library() == path == _build.built_library()
    path.unlink()
    with pytest.raises(RuntimeError, match=_build.COMMAND):
        _build.library()
    assert len(builds) == 1


def test_without_a_compiler(checkout, monkeypatch):
    for name, value in {"CXX": "/nowhere/c++", "CC": "/nowhere/cc", "FORCE_CUDA": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError) as failed:
        _build.library()
    assert "The fused operator is not built, and building it failed" in str(failed.value)
    assert _build.COMMAND in str(failed.value)
    assert "/nowhere/c++" in str(failed.value)


def test_where_nothing_can_be_written(checkout, monkeypatch):
    tried = []

    def mkdir(*args, **settings):
        tried.append(1)
        raise OSError(30, "Read-only file system", str(checkout))

    monkeypatch.setattr(_build.Path, "mkdir", mkdir)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"building it failed.*Read-only file system"):
            _build.library()
    assert len(tried) == 1  # a build that failed is not tried again


def test_the_name_tells_whether_cuda_is_in_it(checkout):
    assert _build.library_name(True) != _build.library_name(False)


def test_a_library_that_cannot_be_loaded(checkout):
    path = checkout / "common" / "fused" / f"{_build.library_name(False)}.so"
    path.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-c", CALL], cwd=checkout, capture_output=True, text=True
    )
    assert f"{path} cannot be loaded: delete it and run {_build.COMMAND}" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible, CUDA is built")
def test_without_cuda():
    fused_transform(torch.zeros(3, 4, 4))
    op = "fused_transform::separable_map"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        pytest.skip("built with FORCE_CUDA=1")
    # a kernel that is missing is named, also where a dense image of this shape came before
    with pytest.raises(RuntimeError, match=r"no kernel for torch\.sparse_coo images"):
        fused_transform(torch.zeros(3, 4, 4).to_sparse())
