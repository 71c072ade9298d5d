"""setuptools' commands for the kernels: what is compiled, with which options, and the tag of the wheel."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from building.old_glibc import linker_arguments
from building.toolchain import Torch, cuda_home, cxx, find_torch, nvcc, wants_cpu, wants_cuda

KERNELS, BUILDING = Path("kernels"), Path("kernels", "building")  # setup.py runs in its own folder
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", *STABLE_ABI]  # the latter: in GCC 12's own immintrin.h
ISA_FLAGS = {
    "rows_avx2.cpp": ["-mavx2", "-mfma"],
    "rows_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", *STABLE_ABI]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]


def cpu_sources() -> list[Path]:
    """The vector code of other processors is left out where it does not compile."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [path for path in sorted((KERNELS / "cpu").glob("*.cpp")) if x86 or path.name not in ISA_FLAGS]


def cuda_sources() -> list[Path]:
    return sorted((KERNELS / "cuda").glob("*.cu")) + sorted((KERNELS / "cuda").glob("*.cpp"))


def divergences() -> list[tuple[str, str]]:
    """Name and C++ struct of every divergence that has kernels."""
    return re.findall(r"^ +entry\((\w+), (\w+)\)", (KERNELS / "shared" / "spec.h").read_text(), re.MULTILINE)


def units(source: Path) -> list[tuple[str, list[str]]]:
    """Name and macros of what a source is compiled to: itself, or one object for each divergence."""
    if source.name != "rows_kind.cu":
        return [(source.name, [])]
    return [(f"rows_{kind}.cu", [f"-DGKD_NAME={kind}", f"-DGKD_STRUCT={struct}"]) for kind, struct in divergences()]


def extensions() -> list[Extension]:
    """None where there is nothing to compile with: gkd then computes with the reference, and says so."""
    found = []
    if wants_cpu():
        found.append(Extension("gkd._cpu", [str(path) for path in cpu_sources()]))
    if wants_cuda() and cuda_sources():
        found.append(Extension("gkd._cuda", [str(path) for path in cuda_sources()]))
    return found


def architectures() -> list[str]:
    """-gencode options: machine code for each, and PTX of sm_90, which later ones without machine code compile."""
    archs = os.environ.get("GKD_CUDA_ARCHS", "80;90;100").split(";")
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = "90" if "90" in archs else archs[-1]
    return [*options, f"-gencode=arch=compute_{portable},code=compute_{portable}"]


class BuildKernels(build_ext):
    """Compiles each unit once, several at a time, and again only if its source or a header has changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # not bound to one Python

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "gkd's kernels are compiled against torch 2.11 or newer, which is not installed: install it first, or "
                "leave them out with GKD_BUILD_CPU=0 GKD_BUILD_CUDA=0"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        folder = Path("build", "kernels", ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            tasks = [
                pool.submit(self._compile, source, macros, folder / f"{name}.o", torch)
                for source in map(Path, ext.sources)
                for name, macros in units(source)
            ]
            objects = [task.result() for task in tasks]
        self._link(objects, target, torch, cuda=ext.name.endswith("_cuda"))

    def _compile(self, source: Path, macros: list[str], out: Path, torch: Torch) -> Path:
        inputs = [source, Path(__file__), *KERNELS.rglob("*.h"), *KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.inc")]
        if out.exists() and all(path.stat().st_mtime < out.stat().st_mtime for path in inputs):
            return out
        include = ["-isystem", str(torch.include)]
        if source.suffix == ".cu":
            compiler = nvcc()
            if compiler is None:
                raise SystemExit(
                    "GKD_BUILD_CUDA asks for the CUDA kernels, but no nvcc was found: set NVCC or CUDA_HOME"
                )
            command = [compiler, *NVCC_FLAGS, *architectures(), *include]
        else:
            cuda = ["-DUSE_CUDA", "-isystem", str(cuda_home() / "include")] if "cuda" in source.parts else []
            command = [*_cxx(), *CXX_FLAGS, *ISA_FLAGS.get(source.name, []), *cuda, *include]
        _run([*command, *macros, "-c", str(source), "-o", str(out)])
        return out

    def _link(self, objects: list[Path], target: Path, torch: Torch, cuda: bool) -> None:
        flags = [f"-L{torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        if cuda:
            flags += [*(f"-L{cuda_home() / name}" for name in ("lib64", "lib")), "-lcudart_static"]
            flags += ["-lrt", "-lpthread", "-ldl"]
        flags.append(f"-Wl,--version-script={BUILDING / 'exports.map'}")
        command = [*_cxx(), "-shared", "-fPIC", *map(str, objects), *flags, "-o", str(target)]
        if os.environ.get("GKD_BUILD_PORTABLE", "0") != "0":
            # not libgcc: its unwinder asks for a new glibc, and a machine with torch has libgcc's library
            command += [str(BUILDING / "portable.cpp"), "-static-libstdc++", "-Wl,--gc-sections", "-s"]
            _run(command)
            command += linker_arguments(target, objects[0].parent)
        _run(command)


class KernelWheel(bdist_wheel):
    """One wheel for every Python: the kernels know of torch alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _cxx() -> list[str]:
    compiler = cxx()
    if compiler is None:
        raise SystemExit("gkd's kernels need a C++ compiler, but no g++ was found: install one, or set CXX")
    return compiler


def _run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"gkd's kernels do not compile with {command[0]}: they need g++ 11 or newer (set CXX), and GKD_BUILD_CPU=0 "
            "installs gkd without them"
        )
