"""What rows tell an environment is read as it stands, and checked with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkd.config import make_config
from gkd.data.formats import read_rows
from gkd.data.tasks import check_tasks
from gkd.errors import ConfigError, DataError

BASE = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}


def test_a_task_is_any_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    tasks = [{"answer": 3}, "text", [1, 2], 0, False]
    file.write_text("".join(json.dumps({"prompt": "a", "task": task}) + "\n" for task in tasks) + '{"prompt": "b"}\n')
    assert [row.task for row in read_rows(str(file), "train")] == [*map(json.dumps, tasks), None]


def test_a_row_that_an_environment_cannot_work_with_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "task": {"answer": 3}}\n{"prompt": "b"}\n{"prompt": "c", "task": {"answer": "3"}}\n'
    )
    rows = read_rows(str(file), "train")
    check_tasks(rows, None)
    for kind, line in (("calculator", 3), ("text_game", 1)):
        environment = make_config({**BASE, "environment": {"kind": kind}}).environment
        with pytest.raises(DataError, match=rf"rows\.jsonl:{line}: task: expected .*, for environment\.kind: {kind}"):
            check_tasks(rows, environment)


RELATIONS = {"kind": "relations", "relation_heads": 2}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"environment": {}}, r"environment\.kind: is missing; one of .*calculator, text_game"),
        ({"environment": {"kind": "calculater"}}, r"environment\.kind: unknown environment 'calculater'; did you mean"),
        ({"environment": {"kind": "calculator", "turns": 3}}, r"environment\.turns: unknown key"),
        ({"environment": {"kind": "calculator", "max_turns": 0}}, r"environment\.max_turns: 0 must be at least 1"),
        ({"environment": {"kind": "calculator", "role": "system"}}, r"environment\.role: .*'user' or 'tool'"),
        ({"environment": {"kind": "calculator", "timeout_s": 0}}, r"environment\.timeout_s: .*greater than 0"),
        ({"mixture": {"student": 0.0, "teacher": 1.0}}, r"environment: only the student's own texts are conversations"),
        ({"rollout": {"tensor_parallel": 2}}, r"rollout\.tensor_parallel: 2 samples no conversations; set it to 1"),
        ({"objective": {"terms": [RELATIONS]}}, r"objective\.terms\.0: relations compares the positions of one text"),
        ({"environment": "calculator"}, r"environment: 'calculator' is no mapping such as \{kind: answer\}"),
        ({"environment": {"kind": "calculator", "max_turn": 2}}, r"max_turn: unknown key; did you mean max_turns\?"),
        (
            {"environment": {"kind": "calculator", "match": "exact"}},
            r"match: unknown key; it is of another kind of env",
        ),
        (
            {"environment": {"kind": "calculator", "turn_tokens": 128}},
            r"environment\.turn_tokens: 128 leave no second turn of rollout\.max_new_tokens = 128",
        ),
    ],
)
def test_what_a_config_cannot_say(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({**BASE, "environment": {"kind": "calculator"}, **sections})
