"""What a teacher is to the rest of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gkd.types import Rollout, TeacherScores


class Teacher(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> TeacherScores:
        """Hidden states of the positions that predict each completion token, and the output head."""
        ...
