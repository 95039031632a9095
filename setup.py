"""Builds the fused operator ahead of time: `python setup.py build_ext --inplace`, or
`pip install --no-build-isolation .`, which installs the package `fused_transform` alone.

FORCE_CUDA=1 builds the CUDA kernel without a visible GPU (then set TORCH_CUDA_ARCH_LIST),
FORCE_CUDA=0 leaves it out; CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and CXX are respected (CXX
without arguments, as torch quotes it).
"""

import importlib.util
import os
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# the file alone: importing its package would load the library that is about to be built
path = Path(__file__).resolve().parent / "common" / "fused" / "_build.py"
spec = importlib.util.spec_from_file_location("_build", path)
_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_build)


class Wheel(bdist_wheel):
    """Links libtorch but not Python, so one wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
    def run(self) -> None:
        for stale in Path(self.build_lib).rglob("_fused_*.so"):  # setuptools would pack them, too
            stale.unlink()
        super().run()

    def copy_file(self, source, target, *arguments, **options):
        """Atomic: loading a part of a library may end the process."""
        part = f"{target}.part"
        try:
            super().copy_file(source, part, *arguments, **options)
            os.replace(part, target)
        finally:
            Path(part).unlink(missing_ok=True)
        return target, True


force = os.environ.get("FORCE_CUDA")
cuda = force == "1" or (force != "0" and torch.cuda.is_available() and CUDA_HOME is not None)
switches = {name: os.environ.get(name) for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX")}
print(f"fused operator: torch={torch.__version__} FORCE_CUDA={force} -> CUDA={cuda}")
print(f"fused operator: CUDA_HOME={CUDA_HOME} {switches}")

flags = _build.FLAGS + (["-DUSE_CUDA"] if cuda else [])
extension = (CUDAExtension if cuda else CppExtension)(
    f"fused_transform.{_build.library_name(cuda)}",
    _build.SOURCES + (_build.CUDA_SOURCES if cuda else []),
    depends=[f"csrc/{file.name}" for file in _build.source_files()],
    extra_compile_args={"cxx": [*flags, "-fvisibility=hidden"], "nvcc": flags},
    py_limited_api=True,  # without Python.h or libtorch_python
)
setup(
    packages=["fused_transform"],
    package_dir={"fused_transform": "common/fused"},
    ext_modules=[extension],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    options={"build_ext": {"force": True}},  # ninja sees what is new; setuptools not every switch
)
