"""What a teacher is to the rest of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gkd.types import Rollout, TeacherScores


class Teacher(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """What is said of each rollout's completion; of an empty one scores of 0 tokens."""
        ...
