"""Tasks whose answers a program checks: `reasoning-gym` makes the problems and judges the answers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.errors import ConfigError

_INSTRUCTION = "Give only the answer, without an explanation."


@dataclass(frozen=True)
class VerifiedTask:
    """A list of problems that depends on name, number and seed alone."""

    name: str
    _problems: Any

    @property
    def questions(self) -> list[str]:
        """One message a problem."""
        return [f"{problem['question']}\n\n{_INSTRUCTION}" for problem in self._problems]

    def solved(self, answers: Sequence[str]) -> list[bool]:
        """Whether each problem's answer is right: full marks of the task's own verifier.

        An answer counts as a whole, or what stands in it between <answer> and </answer>.
        """
        pairs = zip(answers, self._problems, strict=True)
        return [_is_right(self._problems.score_answer, text, problem) for text, problem in pairs]


def _is_right(score: Callable[[str, Any], float], text: str, problem: Any) -> bool:
    from reasoning_gym.utils import extract_answer

    return score(extract_answer(text) or text.strip(), problem) >= 1.0


def load_verifier(name: str, key: str) -> Callable[[str, Mapping[str, Any]], bool]:
    """Whether a text is the answer to a problem (`question`, `answer`, `metadata`) of a task, as `solved` judges it.

    Raises ConfigError, naming `key`, if reasoning-gym is missing or does not know the task.
    """
    tasks = _known_tasks(key)
    _check_known(name, tasks, key)
    of_task, settings = tasks[name]
    score = of_task(config=settings()).score_answer
    return lambda text, problem: _is_right(score, text, problem)


def load_tasks(names: Sequence[str], problems: int, seed: int) -> list[VerifiedTask]:
    """Raises ConfigError, naming eval.tasks, if reasoning-gym is missing or does not know a task."""
    if not names:
        return []
    tasks = _known_tasks("eval.tasks")
    for name in names:
        _check_known(name, tasks, "eval.tasks")
    from reasoning_gym.factory import create_dataset

    return [VerifiedTask(name, create_dataset(name, size=problems, seed=seed)) for name in names]


def _known_tasks(key: str) -> Mapping[str, Any]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"{key}: needs reasoning-gym ({error}); run `pip install 'gkd[eval]'`, or leave it out"
        ) from None
    return DATASETS


def _check_known(name: str, tasks: Mapping[str, Any], key: str) -> None:
    if name not in tasks:
        raise ConfigError(f"{key}: reasoning-gym has no task {name!r}{_close(name, tasks)}")


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
