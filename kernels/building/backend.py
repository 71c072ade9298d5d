"""The build backend that pyproject.toml names: setuptools', which asks for torch only where that is needed.

Compiling needs torch's headers. pip builds in an environment of its own, and a torch listed in `build-system.requires`
would be fetched into it although one is installed: several gigabytes where PyPI's build for CUDA is the newest. So
torch is asked for only if there is something to compile and none in the environment that is installed into.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from building.toolchain import find_torch, wants_cpu, wants_cuda

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_to_fetch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_to_fetch()]


def torch_to_fetch() -> list[str]:
    """gkd's own requirement of torch, if the build has to bring one: so that it is the one that is installed next."""
    if not (wants_cpu() or wants_cuda()) or find_torch() is not None:
        return []
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [requirement for requirement in project["dependencies"] if requirement.startswith("torch")]
