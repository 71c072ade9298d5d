"""The one place where a rollout becomes what its teacher reads, wherever that is."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.teacher.base import Teacher
from gkd.types import Rollout, TeacherScores


class WithViews:
    """Implements `Teacher`: every completion is scored behind the context that its prompt has for the teacher.

    Everything behind it (placements, caches, servers) knows of one context a rollout: the prompt that it is handed.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        return self._teacher.score([rollout.as_its_teacher_reads() for rollout in rollouts])
