"""Where the operator's library comes from: built, stale, broken, without a compiler or CUDA."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
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


def test_what_editors_leave_beside_the_sources_changes_nothing(checkout):
    name = _build.library_name(False)
    (checkout / "csrc" / ".#fused.cpp").symlink_to("me@host.1")
    (checkout / "csrc" / ".ipynb_checkpoints").mkdir()
    for left in (".fused.cpp.swp", "fused.cpp~", "a.out"):
        (checkout / "csrc" / left).touch()
    assert _build.library_name(False) == name


def test_no_part_of_a_library_is_left(tmp_path, monkeypatch):
    settings = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: settings.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    build = settings["cmdclass"]["build_ext"](setuptools.Distribution())
    old, new = tmp_path / "old.so", tmp_path / "new.so"
    old.write_text("old")
    new.write_text("new")

    def full(_self, source, target, **options):
        Path(target).write_text(Path(source).read_text()[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(setuptools.Command, "copy_file", full)
        with pytest.raises(OSError, match="No space"):
            build.copy_file(str(new), str(old))
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["new", "old"]
    build.copy_file(str(new), str(old))
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["new", "new"]


@pytest.mark.parametrize(
    "before",
    [
        "torch.ops.load_library(_build.library())",
        "from common.fused import _ops; _ops.load(); importlib.reload(_ops)",
    ],
)
def test_gradients_after_the_library_was_loaded_otherwise(before):
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("_build", {_build.__file__!r})
_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_build)
{before}
from common.fused import fused_transform
x = torch.rand(3, 8, 8, requires_grad=True)
fused_transform(x).sum().backward()
assert x.grad.sum() > 0
"""
    fused_transform(torch.zeros(3, 4, 4))  # builds it
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_installed_without_sources(checkout, builds):
    path = _build.library()
    shutil.rmtree(checkout / "csrc")
    assert _build.library() == path == _build.built_library()
    path.unlink()
    with pytest.raises(RuntimeError, match=_build.COMMAND):
        _build.library()
    assert len(builds) == 1


def test_an_installed_package_in_a_checkout_is_none(checkout, builds, monkeypatch):
    path = _build.library()
    place = checkout / "vendor" / "fused_transform"
    place.mkdir(parents=True)
    monkeypatch.setattr(_build, "HERE", place)
    shutil.copy(path, place)
    (checkout / "csrc" / "fused.h").write_text("// changed")
    assert _build.library() == place / path.name


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
