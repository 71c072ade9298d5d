"""The one place where a teacher's scores are cut to what is scored of a conversation, wherever the teacher is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gkd.teacher.base import Teacher
from gkd.types import HiddenScores, NoScores, Rollout, TeacherScores, TopkScores


class OfTurns:
    """Implements `Teacher`: rows of observations are left out.

    Everything behind it (placements, caches, servers) scores whole completions: a teacher reads the observations too.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """A row for each of a rollout's `scored_places`."""
        scores = self._teacher.score(rollouts)
        return [_of_turns(one, rollout) for one, rollout in zip(scores, rollouts, strict=True)]


def _of_turns(scores: TeacherScores, rollout: Rollout) -> TeacherScores:
    if rollout.conversation is None or isinstance(scores, NoScores):
        return scores
    places = torch.tensor(rollout.scored_places, dtype=torch.int64)
    if isinstance(scores, TopkScores):
        rows = places.to(scores.ids.device)
        return TopkScores(scores.ids[rows], scores.log_probs[rows])
    assert isinstance(scores, HiddenScores)
    prompt = len(rollout.draw.prompt.token_ids)
    every = torch.cat([torch.arange(prompt), prompt + places])
    return scores.of_rows(places.to(scores.states.device), every.to(scores.states.device))
