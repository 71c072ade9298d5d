"""Commands that know of one teacher, whose whole distribution they need, say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from launching import run_gkd

from gkd.config import Config, make_config
from gkd.evaluate.evaluation import _with_whole_teacher

TOPK = {"model": "t", "placement": "topk", "addresses": ["http://127.0.0.1:9"]}


def values(**sections: object) -> dict[str, object]:
    return {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d", "heldout": "h"}, **sections}


@pytest.mark.parametrize("command", ["plan", "eval"])
def test_several_teachers_are_refused(tmp_path: Path, tiny_student: Path, command: str) -> None:
    path = tmp_path / "run.yaml"
    own = {"model": str(tiny_student)}
    path.write_text(
        yaml.safe_dump(values(teacher=own, student=own, other_teachers={"b": {"model": "b", "weight": 0.5}}))
    )
    result = run_gkd([command, path])
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"other_teachers: gkd {command} " in result.stderr and "other_teachers={}" in result.stderr


def test_a_plan_for_a_top_k_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    path = tmp_path / "run.yaml"
    own = {"model": str(tiny_student)}
    path.write_text(yaml.safe_dump(values(teacher={**TOPK, **own}, student=own)))
    result = run_gkd(["plan", path])
    assert result.returncode == 2 and "teacher.placement: gkd plan cannot know" in result.stderr
    assert run_gkd(["plan", path, "--teacher", "served"]).returncode == 0


def test_an_evaluation_loads_a_top_k_teacher_itself() -> None:
    config: Config = _with_whole_teacher(make_config(values(teacher=TOPK)))
    assert (config.teacher.placement, config.teacher.addresses) == ("local", None)
