"""One turn, judged: what a row's `task` says the answer is, looked for in the student's text.

    {"prompt": "17 * 23?", "task": {"answer": 391}}            match: number     the last number in the text
    {"prompt": "The capital of France?", "task": {"answer": "Paris"}}
                                                               match: exact      all of the text, case and space aside
                                                               match: contains   anywhere in the text, case aside

The reward is 1 or 0; a text that does not end is wrong. For judges of other kinds see `gkd.plugins`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from gkd.environments.base import Environment, EnvironmentKind, Observed, Task

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def last_number_is(text: str, answer: float) -> bool:
    """Commas among digits are not read."""
    numbers = _NUMBER.findall(text)
    return bool(numbers) and math.isclose(float(numbers[-1].replace(",", "")), answer, rel_tol=1e-9, abs_tol=1e-9)


def _is_all(text: str, answer: str) -> bool:
    return _plain(text) == _plain(answer)


def _is_in(text: str, answer: str) -> bool:
    return _plain(answer) in _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


MATCHES: dict[str, Callable[[str, Any], bool]] = {"number": last_number_is, "exact": _is_all, "contains": _is_in}


class AnswerKind(EnvironmentKind):
    match: Literal["number", "exact", "contains"] = Field("number", description="answer: how the text is compared")

    def open(self) -> Environment:
        return Judge(self.match)

    def check_task(self, data: Any) -> None:
        answer_of(data, str if self.match != "number" else float)


class Judge(Environment):
    def __init__(self, match: str) -> None:
        self._match = match

    def reset(self, task: Task) -> None:
        self._answer = answer_of(task.data, str if self._match != "number" else float)

    def step(self, turn: str) -> Observed:
        return Observed("", done=True, reward=float(MATCHES[self._match](turn, self._answer)))

    def unfinished(self) -> float | None:
        return 0.0


def answer_of(data: Any, kind: type) -> Any:
    """The `answer` of a task. Raises ValueError for one that is missing, or of another kind."""
    answer = data.get("answer") if isinstance(data, dict) else None
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if not (is_number if kind is float else isinstance(answer, str) and answer.strip()):
        raise ValueError(f'expected {{"answer": {"a number" if kind is float else "text"}}}')
    return kind(answer)
