"""constraints.txt, the set that was tested, holds every package that gkd asks for, in a version that it takes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_MACHINES = {"vllm", "wandb", "lm-eval"}  # not in the environment of the tests
REQUIREMENTS = [
    requirement
    for listed in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, listed)
    if requirement.name not in {"gkd", *OTHER_MACHINES}
]
TESTED = {
    canonicalize_name(pinned.name): pinned
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for pinned in [Requirement(line)]
}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_tested_version_is_in_range(requirement: Requirement) -> None:
    (exact,) = TESTED[canonicalize_name(requirement.name)].specifier
    assert exact.operator == "==" and requirement.specifier.contains(exact.version)
