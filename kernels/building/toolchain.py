"""What the machine has to build with: torch's headers and libraries, a C++ compiler, nvcc.

torch is only read as files, never imported: pip's isolated build hides the one that is installed from `import`, and
importing takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)  # whose stable ABI the kernels are compiled for


@dataclass(frozen=True)
class Torch:
    """An installed torch. `cuda` is the version of CUDA that it was built for, or None."""

    root: Path
    version: str
    cuda: str | None

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def find_torch() -> Torch | None:
    """The first torch with headers of the stable ABI: importable, or in the environment that pip installs into.

    Any will do, whichever one the result is used with: the stable ABI is the same in all.
    """
    for folder in _site_folders():
        torch = _read_torch(folder / "torch")
        if torch is not None and tuple(map(int, torch.version.split(".")[:2])) >= OLDEST_TORCH:
            return torch
    return None


def _site_folders() -> Iterator[Path]:
    yield from map(Path, sys.path)
    yield from map(Path, site.getsitepackages([sys.prefix, sys.base_prefix]))
    yield Path(site.getusersitepackages())


def _read_torch(root: Path) -> Torch | None:
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return None
    values = dict(re.findall(r"^(__version__|cuda)\b[^=]*=\s*['\"](.+?)['\"]", text, flags=re.MULTILINE))
    if "__version__" not in values or not (root / "include" / "torch" / "csrc" / "stable").is_dir():
        return None
    return Torch(root, values["__version__"], values.get("cuda"))


def cxx() -> list[str] | None:
    """The C++ compiler, with the options that $CXX has, or None. Raises SystemExit if $CXX is not there."""
    asked = os.environ.get("CXX")
    command = (asked or "g++").split()
    if shutil.which(command[0]) is not None:
        return command
    if asked:
        raise SystemExit(f"CXX asks for {command[0]}, which was not found")
    return None


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def cuda_home() -> Path:
    """The toolkit that the compiler belongs to, which the one on the path may only be a script for."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    asked = [nvcc() or "nvcc", "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    lines = subprocess.run(asked, capture_output=True, text=True).stderr.splitlines()
    top = next((line.split("TOP=", 1)[1] for line in lines if "TOP=" in line), "/usr/local/cuda")
    return Path(top).resolve()


def wants_cpu() -> bool:
    """Whether to build the CPU kernels: as asked, else on Linux with a C++ compiler."""
    asked = os.environ.get("GKD_BUILD_CPU")
    if asked is not None:
        return asked != "0"
    return sys.platform == "linux" and cxx() is not None


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: as asked, else where this machine could run them."""
    asked = os.environ.get("GKD_BUILD_CUDA")
    if asked is not None:
        return asked != "0"
    torch = find_torch()
    return wants_cpu() and nvcc() is not None and torch is not None and torch.cuda is not None
