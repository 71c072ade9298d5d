"""Advice: given where a source speaks against what was set, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import save_prompts

from gkd.config import advice, advice_on_share, load_config, make_config
from gkd.train.distiller import Distiller

OFF_POLICY = {"mixture": {"student": 0.0, "dataset": 1.0}}
SOFT = {"kind": "forward_kl", "weight": 0.3}
HARD = {"kind": "cross_entropy", "weight": 0.7}
CUT = {"student": {"init": {"layers": 2}}}


def given(**sections: Any) -> list[str]:
    base = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}
    return advice(make_config({**base, **sections}))


@pytest.mark.parametrize(
    ("sections", "source", "key"),
    [
        ({**OFF_POLICY, "objective": {"temperature": 0.7}}, "1503.02531", "objective.temperature"),
        (
            {**OFF_POLICY, "objective": {"terms": [SOFT, HARD]}},
            "labels have 70%.*1503.02531",
            "objective.terms.1.weight",
        ),
        (
            {"objective": {"temperature": 2, "terms": [{"kind": "jsd"}, {"kind": "cross_entropy"}]}},
            "1/4 of what.*1503.02531",
            "objective.terms.0.scale_by_temperature_squared",
        ),
        ({**CUT, "optim": {"lr": 1e-6}}, "1e-06 is little.*2408.11796", "optim.lr"),
        ({"optim": {"lr": 1e-3}}, "0.001 is much.*2306.08543", "optim.lr"),
    ],
)
def test_one_line_with_source_and_key(sections: dict[str, Any], source: str, key: str) -> None:
    (line,) = given(**sections)
    assert re.search(source, line) and line.startswith("advice: ") and line.endswith(f": {key}")
    assert "\n" not in line


@pytest.mark.parametrize(
    "sections",
    [
        {},
        CUT,
        {**CUT, "optim": {"lr": 1e-5}},  # the default, written out
        {**CUT, "optim": {"lr": 3e-4}},
        {"optim": {"lr": 1e-5}},
        {"student": {"model": "s", "lora": {}}, "optim": {"lr": 1e-3}},
        {"objective": {"temperature": 0.7}},  # on policy
        {**OFF_POLICY, "objective": {"temperature": 1.0}},
        {**OFF_POLICY, "objective": {"temperature": 3.0}},  # sources contradict one another
        {**OFF_POLICY, "objective": {"terms": [{**SOFT, "weight": 0.7}, {**HARD, "weight": 0.3}]}},
        {**OFF_POLICY, "objective": {"terms": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]}},
        {"objective": {"terms": [SOFT, HARD]}},  # on policy
        {**OFF_POLICY, "optim": {"lr": 1e-3}},
        {"mixture": {"student": 0.5, "dataset": 0.5}, "objective": {"temperature": 0.7}},
        {
            "objective": {
                "temperature": 2,
                "terms": [{"kind": "jsd", "scale_by_temperature_squared": True}, {"kind": "cross_entropy"}],
            }
        },
    ],
)
def test_nothing_else_is_spoken_of(sections: dict[str, Any]) -> None:
    assert given(**sections) == []


def test_no_config_that_is_shipped_needs_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    files = [*Path("configs").glob("*.yaml"), *Path("configs/methods").glob("*.yaml")]
    assert len(files) > 10
    assert [(file, line) for file in files for line in advice(load_config(file))] == []


def test_a_dry_run_says_it_of_the_models_too(tiny_teacher: Path, tmp_path: Path) -> None:
    assert advice_on_share(5, 100) is None
    line = advice_on_share(4, 100)
    assert line is not None and "4.0%" in line and "2.5 times" in line and "2311.07052" in line
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"model": str(tiny_teacher)},
        "student": {"init": {"layers": 1, "width": {"hidden": 8, "ffn": 8}}},
        "data": {"train": str(save_prompts(tmp_path / "train.jsonl", 40)), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 8},
        "optim": {"lr": 1e-6},
    }
    advised = [line for line in Distiller(values).check() if line.startswith("advice: ")]
    assert len(advised) == 2 and "2408.11796" in advised[0] and "2311.07052" in advised[1]
