"""Tasks whose answers a program checks: `reasoning-gym` makes the problems and judges the answers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
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
        from reasoning_gym.utils import extract_answer

        return [
            self._problems.score_answer(extract_answer(text) or text.strip(), problem) >= 1.0
            for text, problem in zip(answers, self._problems, strict=True)
        ]


def load_tasks(names: Sequence[str], problems: int, seed: int) -> list[VerifiedTask]:
    """Raises ConfigError, naming eval.tasks, if reasoning-gym is missing or does not know a task."""
    if not names:
        return []
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError(
            f"eval.tasks: needs reasoning-gym ({error}); run `pip install 'gkd[eval]'`, or leave the list empty"
        ) from None
    unknown = next((name for name in names if name not in DATASETS), None)
    if unknown is not None:
        raise ConfigError(f"eval.tasks: reasoning-gym has no task {unknown!r}{_close(unknown, DATASETS)}")
    return [VerifiedTask(name, create_dataset(name, size=problems, seed=seed)) for name in names]


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
