"""`make wheel`: what is in it, and that it computes natively in a fresh environment beside torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="make venv installs auditwheel"),
    pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux"),
]

NATIVE = """
import sys, sysconfig, warnings
warnings.simplefilter("error")
import gkd, torch
from gkd.ops import native
assert gkd.__file__.startswith(sysconfig.get_path("purelib")), gkd.__file__
assert native.DEVICES >= {"cpu"}, native.DEVICES
student, teacher = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
loss = gkd.divergence(student, teacher, "jsd", beta=0.5, reduction="mean")
loss.backward()
assert loss > 0 and student.grad.abs().sum() > 0
assert gkd.divergence(teacher, teacher, "jsd") == 0
value = torch.empty(4)
native.score_rows(teacher, student.detach(), native.Divergence("forward_kl"), value=value)
mean, log_probs = torch.log_softmax(teacher, -1), torch.log_softmax(student.detach(), -1)
assert torch.allclose(value, (log_probs.exp() * (log_probs - mean)).sum(-1), atol=1e-5)
try:
    native.score_rows(teacher, student.detach(), native.Divergence("forward_kl"), value=torch.empty(9))
except RuntimeError as error:  # thrown by the kernels, caught by torch, which has another libstdc++
    assert "size" in str(error), error
else:
    raise AssertionError("a value of another size was taken")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the CUDA kernels, which take minutes; the objects of the last build are taken where they are current."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "building.wheel", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"GKD_BUILD_CUDA": "0", "PYTHONPATH": "kernels"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_it_is_for_every_python_and_for_old_machines(wheel: Path) -> None:
    glibc = re.search(r"-py3-none-manylinux_2_(\d+)_\w+\.whl$", wheel.name)
    assert glibc is not None and int(glibc[1]) <= 28, f"{wheel.name}: torch itself runs from manylinux_2_28 on"
    names = zipfile.ZipFile(wheel).namelist()
    assert "gkd/_cpu.so" in names and "gkd/py.typed" in names
    assert not [name for name in names if ".libs/" in name], "nothing of torch's is packed in"


def test_it_has_libstdcxx_inside(wheel: Path, tmp_path: Path) -> None:
    library = zipfile.ZipFile(wheel).extract("gkd/_cpu.so", tmp_path)
    read = subprocess.run(["readelf", "-d", "-V", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in read and "libstdc++" not in read and "GLIBCXX" not in read


def test_it_computes_natively_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # behind its own packages
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", NATIVE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
