"""A verifier of one turn: by the last number, by all of the text, or anywhere in it."""

from __future__ import annotations

from typing import Any

import pytest

from gkd.environments import Task
from gkd.environments.answer import AnswerKind


@pytest.mark.parametrize(
    ("match", "answer", "turn", "reward"),
    [
        ("number", 391, "17 * 23 = 391", 1.0),
        ("number", 391, "391, not 392", 0.0),
        ("number", 1391, "It is 1,391.", 1.0),
        ("number", -2.5, "x = -2.50", 1.0),
        ("number", 391, "", 0.0),
        ("exact", "New York", " new\n york ", 1.0),
        ("exact", "New York", "It is New York", 0.0),
        ("contains", "New York", "It is new  york.", 1.0),
        ("contains", "New York", "York", 0.0),
    ],
)
def test_what_is_right(match: Any, answer: object, turn: str, reward: float) -> None:
    judge = AnswerKind(kind="answer", match=match).open()
    judge.reset(Task("?", {"answer": answer}, 0))
    observed = judge.step(turn)
    assert observed.done and observed.reward == reward and judge.unfinished() == 0.0


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="below 1e308"):
        AnswerKind(kind="answer").check_task({"answer": 10**400})


@pytest.mark.parametrize("match", ["number", "exact"])
@pytest.mark.parametrize("data", [None, {}, 3, {"answer": None}, {"answer": True}, {"answer": [3]}, {"answer": " "}])
def test_a_task_without_an_answer_is_refused(match: Any, data: object) -> None:
    with pytest.raises(ValueError, match=r'expected \{"answer": (a number|text)\}'):
        AnswerKind(kind="answer", match=match).check_task(data)
