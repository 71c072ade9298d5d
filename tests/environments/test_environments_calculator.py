"""The calculator computes what is arithmetic, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gkd.environments import Task
from gkd.environments.calculator import Calculator, CalculatorKind, computed, rows

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * (3 + 4)", "84"),
        (" -7 // 2", "-4"),
        ("2 ** 10 % 7", "2"),
        ("1 / 3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 0", "error: division by zero"),
        ("1e308 * 10", "error: too large"),
        ("9 ** 9 ** 9", "error: too large"),
        ("(-8) ** 0.5", "error: not a real number"),
        ("__import__('os').system('x')", "error: not an expression"),
        ("x + 1", "error: not an expression"),
        ("'a' * 9", "error: not an expression"),
        ("1 +", "error: not an expression"),
        ("True + 1", "error: not an expression"),
        ("(" * 150, "error: not an expression"),
        ("1+" * 150 + "1", "error: too long"),
        ("", "error: not an expression"),
        ("1\0", "error: not an expression"),
    ],
)
def test_what_is_computed(expression: str, value: str) -> None:
    began = time.monotonic()
    assert computed(expression) == value
    assert time.monotonic() - began < 1


def test_a_turn_without_a_call_is_the_answer() -> None:
    calculator = Calculator()
    calculator.reset(Task("?", {"answer": 84}, 0))
    called = calculator.step("I try <calc>12 * 7</calc> and <calc>1/0</calc>")
    assert (called.observation, called.done, called.reward) == ("84; error: division by zero", False, None)
    for turn, reward in (("It is 84.", 1.0), ("84 or 85", 0.0), ("I do not know", 0.0), ("84.0", 1.0)):
        answered = calculator.step(turn)
        assert (answered.done, answered.reward) == (True, reward)
    calculator.reset(Task("?", None, 0))
    assert calculator.step("84").reward is None


@pytest.mark.parametrize("data", [3, "84", {}, {"answer": "84"}, {"answer": True}, {"answer": None}])
def test_a_task_without_a_number_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="answer"):
        CalculatorKind(kind="calculator").check_task(data)


def test_the_shipped_rows_are_what_it_makes() -> None:
    for name, made in (("sums", rows(96)), ("sums_heldout", rows(16, seed=1))):
        shipped = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
        assert shipped == [*made]
        assert all(computed(_expression(row)) == str(row["task"]["answer"]) for row in shipped)


def _expression(row: dict[str, list[dict[str, str]]]) -> str:
    return row["prompt"][0]["content"].splitlines()[-1]
