"""What a build asks for and makes: beside torch, without it, and without a compiler."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from launching import check, run_python

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")


def in_a_build(code: str, **environment: str) -> str:
    """What `code` prints where pip's isolated build has hidden all installed packages from `import`."""
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; sys.path.insert(0, 'kernels')\n"
    return check(run_python(["-c", hide + code], cwd=ROOT, PYTHONPATH="", **environment)).stdout.strip()


@pytest.mark.skipif(not torch.__file__.startswith(sys.prefix), reason="torch is not in the environment of this Python")
def test_a_build_finds_the_torch_that_it_installs_beside_and_does_not_import_it() -> None:
    code = "from building.toolchain import find_torch\nprint(find_torch().root, 'torch' in sys.modules)"
    assert in_a_build(code) == f"{Path(torch.__file__).parent} False"


def toolchain_with(folder: Path, version: str) -> str:
    """Code that makes the toolchain see only a torch of this version, with headers and nothing else."""
    (folder / "torch" / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = '13.0'\n")
    return (
        "from pathlib import Path\nfrom building import toolchain\n"
        f"toolchain._site_folders = lambda: iter([Path({str(folder)!r})])\n"
    )


def test_the_cuda_version_of_a_torch_is_read_from_its_files(tmp_path: Path) -> None:
    code = toolchain_with(tmp_path, "2.11.0") + "print(toolchain.find_torch().cuda)"
    assert in_a_build(code) == "13.0"


def test_a_torch_that_is_too_old_is_none_and_nothing_is_compiled_against_it(tmp_path: Path) -> None:
    code = toolchain_with(tmp_path, "2.10.1+cpu") + "print(toolchain.find_torch())"
    assert in_a_build(code) == "None"


def test_torch_is_fetched_for_a_build_only_where_there_is_none_and_a_compiler() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [requirement for requirement in project["dependencies"] if requirement.startswith("torch")]
    code = "import building.toolchain\nbuilding.toolchain.find_torch = lambda: {}\n"
    code += "from building import backend\nprint(backend.torch_to_fetch())"
    packages = f"sys.path.append({str(Path(torch.__file__).parents[1])!r})\n"  # setuptools, which pip brings
    assert in_a_build(packages + code.format(None)) == str(wanted)
    assert in_a_build(packages + code.format(1)) == "[]"
    assert in_a_build(packages + code.format(None), PATH="/nowhere", CXX="") == "[]"
    assert in_a_build(packages + code.format(None), GKD_BUILD_CPU="0", GKD_BUILD_CUDA="0") == "[]"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "CXX asks for no-such-compiler"),
        ({"CXX": "false", "GKD_BUILD_CUDA": "0"}, "need g++ 11 or newer (set CXX), and GKD_BUILD_CPU=0"),
        ({"CXX": "", "PATH": "/nowhere", "GKD_BUILD_CPU": "1"}, "no g++ was found"),
    ],
)
def test_a_compiler_that_fails_is_one_line_with_the_way_out(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "gkd").mkdir()
    (tmp_path / "gkd" / "__init__.py").write_text('__version__ = "0"\n')
    done = run_python(["setup.py", "-q", "build_ext"], cwd=tmp_path, **environment)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1], done.stderr


def test_without_a_compiler_gkd_installs_and_says_once_that_it_computes_with_the_reference(tmp_path: Path) -> None:
    build = ["setup.py", "-q", "build", "--build-base", tmp_path, "bdist_wheel", "--dist-dir", tmp_path]
    check(run_python(build, cwd=ROOT, PATH="/nowhere", CXX=""))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import gkd, torch\nprint(gkd.__file__)\n"
        "for _ in range(2):\n    assert gkd.divergence(torch.randn(3, 9), torch.randn(3, 9)) > 0\n"
    )
    done = check(run_python(["-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")))
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert done.stderr.count("native kernels are missing") == 1 and "g++ 11" in done.stderr
