"""What `make cuda` cross-compiles: machine code for every architecture, and nothing left open but what torch has."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "gkd" / "_cuda.so"

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="make cuda has not been run")

UNSTABLE = ("_ZN2at", "_ZN5torch")  # ATen's and torch's own C++, which changes from version to version


def undefined() -> list[str]:
    out = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in out.stdout.splitlines()]


def test_it_asks_torch_for_its_stable_abi_only() -> None:
    names = undefined()
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if name.startswith(UNSTABLE)] == []


def test_the_cuda_runtime_is_inside() -> None:
    assert [name for name in undefined() if name.startswith("cuda")] == []


def test_every_architecture_has_machine_code() -> None:
    spec = importlib.util.find_spec("triton")
    tool = spec and spec.origin and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("no cuobjdump here")
    listed = subprocess.run([str(tool), "--list-elf", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert listed.count(architecture) >= 7, architecture  # one file for each divergence
    listed = subprocess.run([str(tool), "--list-ptx", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "sm_90" in listed
