"""Runs with two teachers of other sizes: each prompt is taught, written for and measured by its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import MakeConfig, check, read_metrics, run_gkd, torchrun
from tiny import save_tiny_model

NOT_COMPARED = ("time/", "tokens/scored_per_s", "tokens/generated_per_s")


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "teacher", seed=7, layers=2, hidden=128)


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)}
        for record in read_metrics(run)
    ]


@pytest.mark.slow
@pytest.mark.long
def test_with_all_prompts_it_is_the_only_teacher(
    make_run_config: MakeConfig, tmp_path: Path, wide_teacher: Path
) -> None:
    wide = {"model": str(wide_teacher), "dtype": "float32"}
    alone = make_run_config("alone", teacher=wide, run={"steps": 2})
    beside = make_run_config("beside", other_teachers={"wide": {**wide, "weight": 1.0}}, run={"steps": 2})
    for path in (alone, beside):
        check(run_gkd(["train", path]))
    assert records(tmp_path / "beside") == records(tmp_path / "alone")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "beside")]
    for key in ("heldout_forward_kl_before", "heldout_forward_kl_after", "heldout_jsd_after"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.slow
def test_two_ranks_equal_one(make_run_config: MakeConfig, tmp_path: Path, wide_teacher: Path) -> None:
    others = {"wide": {"model": str(wide_teacher), "dtype": "float32", "weight": 0.5}}
    one = make_run_config("one", other_teachers=others, run={"steps": 2})
    two = make_run_config("two", other_teachers=others, run={"steps": 2}, deepspeed={"zero_stage": 3})
    check(run_gkd(["train", one]))
    check(torchrun(2, ["-m", "gkd", "train", two, "optim.micro_batch_size=2"]))
    for ours, theirs in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert ours["tokens/scored"] == theirs["tokens/scored"]
        for name in ("loss", "divergence/reverse_kl", "entropy/teacher", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_an_unknown_name_is_known_before_anything_is_loaded(make_run_config: MakeConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "tutor": "main"}\n{"prompt": "b", "tutor": "mth"}\n')
    path = make_run_config(
        "named", other_teachers={"math": {"model": "no/model"}}, data={"train": str(rows), "teacher_column": "tutor"}
    )
    result = run_gkd(["train", path])
    assert result.returncode == 2
    assert f"{rows}:2: tutor: there is no teacher 'mth'; known: main, math" in result.stderr
    assert not (tmp_path / "named").exists()
