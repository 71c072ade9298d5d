"""Builds the native kernels; everything static is in pyproject.toml.

    gkd/_cpu.so    where a C++ compiler is: the CPU kernels, and the schema of the op
    gkd/_cuda.so   where nvcc and a CUDA build of torch are, or where GKD_BUILD_CUDA=1 asks for it: with a CPU build of
                   torch the result does not load there, but on every machine with a CUDA one

Both use PyTorch's stable ABI: one file serves every torch from 2.11 on, and every Python.

    GKD_BUILD_CPU=0|1          leave out the CPU kernels, or fail where they cannot be built
    GKD_BUILD_CUDA=0|1         leave out, or cross-compile, the CUDA kernels
    GKD_BUILD_PORTABLE=1       libstdc++ and libgcc inside, for other machines than this one (make wheel)
    GKD_CUDA_ARCHS="90;100"    compute capabilities (default 80, 90 and 100, with PTX of the last but one for others)
    CXX, NVCC, CUDA_HOME       the compilers
    MAX_JOBS                   how many of them at a time (default: the number of processors)
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from building.kernels import BuildKernels, KernelWheel, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel})
