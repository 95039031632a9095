"""The CUDA kernel without a GPU: its source runs on the CPU (tests/host_cuda.h) through the tests
of the operator and under the sanitizers. `.ci/run` compiles it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from common.fused import _build
from tests.runs import ROOT

COMPILER = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason="no C++ compiler")
INCLUDES = [f"-I{path}" for path in include_paths()]
STANDARD = "-std=c++20" if torch.__version__ >= "2.12" else "-std=c++17"


def compile_host(output: Path, *options: str) -> None:
    flags = [*_build.FLAGS, STANDARD, "-O1", "-fPIC", "-pthread", *INCLUDES]
    flags += ["-DFUSED_LAUNCH_PROVIDED", "-include", "tests/host_cuda.h"]
    command = [COMPILER, *flags, "tests/host_cuda.cpp", *options, "-o", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


@needs_compiler
def test_passes_the_tests_of_the_operator(tmp_path):
    torch_lib = Path(torch.__file__).parent / "lib"
    library = tmp_path / "host_cuda.so"
    compile_host(library, "-shared", "csrc/fused.cpp", f"-L{torch_lib}", "-ltorch_cpu", "-ltorch")
    chosen = "equals_torchvision or nan or layouts or masks or out or empty or gradient or offsets"
    options = ["-o", "addopts=", "-qx", "tests/test_fused.py", "-k", f"({chosen}) and not threads"]
    # the package loads the library when it is imported, so its _build comes first
    code = f"""
import sys, pathlib, pytest
from importlib.util import module_from_spec, spec_from_file_location
name = "common.fused._build"
spec = spec_from_file_location(name, "common/fused/_build.py")
sys.modules[name] = _build = module_from_spec(spec)
spec.loader.exec_module(_build)
_build.library = _build.built_library = lambda: pathlib.Path({str(library)!r})
sys.exit(pytest.main({options}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 100, done.stdout[-300:]  # the names chosen above still exist


@needs_compiler
@pytest.mark.parametrize(
    ("sanitizer", "cases"),
    [("address,undefined", 8), ("thread", 5)],
)
def test_under_sanitizers(sanitizer, cases, tmp_path):
    program = tmp_path / "host_cuda"
    try:
        # UBSan's checks make -O1 slow to compile; without it TSan's program is slow to run
        level = "-O1" if sanitizer == "thread" else "-Og"
        options = [
            level,
            f"-fsanitize={sanitizer}",
            "-fno-sanitize-recover=all",
            "-DHOST_CUDA_MAIN",
        ]
        compile_host(program, *options)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the compiler cannot build with {sanitizer}: {error.stderr[-200:]}")
    done = subprocess.run([program, "1", str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
