"""Builds the fused operator ahead of time: `python setup.py build_ext --inplace`, or
`pip install --no-build-isolation .`

FORCE_CUDA=1 builds the CUDA kernel without a visible GPU (then set TORCH_CUDA_ARCH_LIST),
FORCE_CUDA=0 leaves it out; CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and CXX are respected.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common.fused import _build

force = os.environ.get("FORCE_CUDA")
cuda = force == "1" or (force != "0" and torch.cuda.is_available() and CUDA_HOME is not None)
switches = {name: os.environ.get(name) for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX")}
print(f"fused operator: torch={torch.__version__} FORCE_CUDA={force} -> CUDA={cuda}")
print(f"fused operator: CUDA_HOME={CUDA_HOME} {switches}")

flags = _build.FLAGS + (["-DUSE_CUDA"] if cuda else [])
extension = (CUDAExtension if cuda else CppExtension)(
    f"common.fused.{_build.library_name()}",
    _build.SOURCES + (_build.CUDA_SOURCES if cuda else []),
    extra_compile_args={"cxx": [*flags, "-fvisibility=hidden"], "nvcc": flags},
    py_limited_api=True,  # without Python.h or libtorch_python
)
setup(
    name="fused-transform",
    version="1.0.0",
    packages=["common.fused"],
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"build_ext": {"force": True}},  # ninja sees what is new; setuptools not every switch
)
