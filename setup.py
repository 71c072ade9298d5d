"""Builds the native kernels; everything static is in pyproject.toml.

    gkd/_cpu.so    always: the CPU kernels, and the schema of the op
    gkd/_cuda.so   where nvcc and a CUDA build of torch are, or where GKD_BUILD_CUDA=1 asks for it: with a CPU build of
                   torch the result does not load there, but on every machine with a CUDA one

Both use PyTorch's stable ABI: one file serves every torch from 2.11 on, and every Python.

    GKD_BUILD_CUDA=0|1         leave out, or cross-compile, the CUDA kernels
    GKD_CUDA_ARCHS="90;100"    compute capabilities (default 80, 90 and 100, with PTX of the last but one for others)
    CXX, NVCC, CUDA_HOME       the compilers
    MAX_JOBS                   how many of them at a time (default: the number of processors)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("kernels")  # setup.py runs in its own folder
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", *STABLE_ABI]  # the latter: in GCC 12's own immintrin.h
ISA_FLAGS = {
    "rows_avx2.cpp": ["-mavx2", "-mfma"],
    "rows_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", *STABLE_ABI]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def torch_paths() -> tuple[Path, Path]:
    """Folders of the headers and of the libraries. torch must be installed first (README: make venv)."""
    import torch

    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: as asked, else where this machine could run them."""
    asked = os.environ.get("GKD_BUILD_CUDA")
    if asked is not None:
        return asked != "0"
    import torch

    return nvcc() is not None and torch.version.cuda is not None


def cpu_sources() -> list[Path]:
    """The vector code of other processors is left out where it does not compile."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [path for path in sorted((KERNELS / "cpu").glob("*.cpp")) if x86 or path.name not in ISA_FLAGS]


def cuda_sources() -> list[Path]:
    return sorted((KERNELS / "cuda").glob("*.cu")) + sorted((KERNELS / "cuda").glob("*.cpp"))


def architectures() -> list[str]:
    """-gencode options: machine code for each, and PTX of sm_90, which later ones without machine code compile."""
    archs = os.environ.get("GKD_CUDA_ARCHS", "80;90;100").split(";")
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = "90" if "90" in archs else archs[-1]
    return [*options, f"-gencode=arch=compute_{portable},code=compute_{portable}"]


class BuildKernels(build_ext):
    """Compiles each source once, several at a time, and again only if it or a header has changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # not bound to one Python

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        folder = Path("build", "kernels", ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [Path(source) for source in ext.sources]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda source: self._compile(source, folder), sources))
        self._link(objects, target, cuda=ext.name.endswith("_cuda"))

    def _compile(self, source: Path, folder: Path) -> Path:
        out = folder / f"{source.name}.o"
        inputs = [source, Path(__file__), *KERNELS.rglob("*.h"), *KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.inc")]
        if out.exists() and all(path.stat().st_mtime < out.stat().st_mtime for path in inputs):
            return out
        include = ["-isystem", str(torch_paths()[0])]
        if source.suffix == ".cu":
            compiler = nvcc()
            if compiler is None:
                raise SystemExit(
                    "GKD_BUILD_CUDA asks for the CUDA kernels, but no nvcc was found: set NVCC or CUDA_HOME"
                )
            command = [compiler, *NVCC_FLAGS, *architectures(), *include]
        else:
            cuda = ["-DUSE_CUDA", "-isystem", str(cuda_home() / "include")] if "cuda" in source.parts else []
            command = [*self._cxx(), *CXX_FLAGS, *ISA_FLAGS.get(source.name, []), *cuda, *include]
        self._run([*command, "-c", str(source), "-o", str(out)])
        return out

    def _link(self, objects: list[Path], target: Path, cuda: bool) -> None:
        libraries = torch_paths()[1]
        torch_flags = [f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        if cuda:
            torch_flags += [*(f"-L{cuda_home() / name}" for name in ("lib64", "lib")), "-lcudart_static"]
            torch_flags += ["-lrt", "-lpthread", "-ldl"]
        self._run([*self._cxx(), "-shared", *map(str, objects), *torch_flags, "-o", str(target)])

    @staticmethod
    def _cxx() -> list[str]:
        return os.environ.get("CXX", "g++").split()

    @staticmethod
    def _run(command: list[str]) -> None:
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def cuda_home() -> Path:
    """The toolkit that the compiler belongs to, which the one on the path may only be a script for."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    asked = [nvcc() or "nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    lines = subprocess.run(asked, capture_output=True, text=True).stderr.splitlines()
    top = next((line.split("TOP=", 1)[1] for line in lines if "TOP=" in line), "/usr/local/cuda")
    return Path(top).resolve()


def extensions() -> list[Extension]:
    found = [Extension("gkd._cpu", [str(path) for path in cpu_sources()])]
    if wants_cuda() and cuda_sources():
        found.append(Extension("gkd._cuda", [str(path) for path in cuda_sources()]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
