"""The workflows of the repository's host run what `.ci/run` runs, and nothing that the Makefile does not have."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUNS = [
    step["run"]
    for job in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    for step in job["steps"]
    if "run" in step
]


def targets(lines: list[str]) -> set[str]:
    return {found[1] for line in lines if (found := re.match(r"make ([\w-]+)", line.strip()))}


def test_every_target_of_the_gate_runs_in_a_workflow() -> None:
    assert targets((ROOT / ".ci" / "run").read_text().splitlines()) <= targets(RUNS)
    assert {"wheel", "docs"} <= targets(RUNS)


def test_every_target_of_a_workflow_exists() -> None:
    existing = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets(RUNS) <= existing
