"""Several teachers, each for its own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gkd.teacher.base import Teacher
from gkd.types import Rollout, TeacherScores


class RoutedTeacher:
    """Implements `Teacher`: every rollout is scored by the teacher that its prompt names."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self._teachers = teachers

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """As the teachers do. All of them are asked, also for nothing: a sharded one needs all ranks."""
        scores: dict[int, TeacherScores] = {}
        for name, teacher in self._teachers.items():
            own = [i for i, rollout in enumerate(rollouts) if rollout.draw.prompt.teacher == name]
            scores |= zip(own, teacher.score([rollouts[i] for i in own]), strict=True)
        return [scores[i] for i in range(len(rollouts))]
