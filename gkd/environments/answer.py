"""One turn, judged: what a row's `task` says the answer is, looked for in the student's text.

    {"prompt": "17 * 23?", "task": {"answer": 391}}            match: number     the last number in the text
    {"prompt": "The capital of France?", "task": {"answer": "Paris"}}
                                                               match: exact      all of the text, case and space aside
                                                               match: contains   anywhere in the text, case aside

The reward is 1 or 0; a text that does not end is wrong. For judges of other kinds see `gkd.plugins`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from gkd.environments.base import Environment, EnvironmentKind, Observed, Task
from gkd.last_number import last_number


def last_number_is(text: str, answer: float) -> bool:
    number = last_number(text)
    return number is not None and math.isclose(float(number), answer, rel_tol=1e-9, abs_tol=1e-9)


def _is_all(text: str, answer: str) -> bool:
    return _plain(text) == _plain(answer)


def _is_in(text: str, answer: str) -> bool:
    return _plain(answer) in _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


MATCHES: dict[str, Callable[[str, Any], bool]] = {"number": last_number_is, "exact": _is_all, "contains": _is_in}


class AnswerKind(EnvironmentKind):
    match: Literal["number", "exact", "contains"] = Field("number", description="answer: how the text is compared")

    @property
    def answers_turns(self) -> bool:
        return False

    def open(self) -> Environment:
        return Judge(self.match)

    def describe(self) -> str:
        return f"{self.kind}, match: {self.match}, one turn"

    def check_task(self, data: Any) -> None:
        _READS[self.match](data)


class Judge(Environment):
    def __init__(self, match: str) -> None:
        self._match = match

    def reset(self, task: Task) -> None:
        self._answer = _READS[self._match](task.data)

    def step(self, turn: str) -> Observed:
        return Observed("", done=True, reward=float(MATCHES[self._match](turn, self._answer)))

    def unfinished(self) -> float | None:
        return 0.0


def number_of(data: Any) -> float:
    """The `answer` of a task. Raises ValueError where it is no number."""
    answer = data.get("answer") if isinstance(data, dict) else None
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise ValueError('expected {"answer": a number}')
    try:
        return float(answer)
    except OverflowError:  # JSON's whole numbers have no end
        raise ValueError('expected {"answer": a number} below 1e308') from None


def text_of(data: Any) -> str:
    """The `answer` of a task. Raises ValueError where it is no text."""
    answer = data.get("answer") if isinstance(data, dict) else None
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError('expected {"answer": text}')
    return answer


_READS: dict[str, Callable[[Any], Any]] = {"number": number_of, "exact": text_of, "contains": text_of}
