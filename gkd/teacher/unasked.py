"""Where no term of the objective compares with a teacher: nobody is asked."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.types import NoScores, Rollout, TeacherScores


class Unasked:
    """Implements `Teacher` for objectives of labels alone."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        return [NoScores(len(rollout.scored_places)) for rollout in rollouts]
