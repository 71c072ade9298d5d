"""A teacher behind somebody else's server, of which only the most likely tokens are told.

Legend: n completion tokens of a rollout, K = `teacher.top_k`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gkd.teacher.endpoints import Endpoints
from gkd.types import Rollout, TeacherScores, TopkScores


class TopkTeacher:
    """Implements `Teacher` with requests to `endpoints`, one a rollout, many at once."""

    def __init__(self, endpoints: Endpoints, *, top_k: int, vocabulary_rows: int, device: torch.device) -> None:
        self._endpoints, self._top_k, self._device = endpoints, top_k, device
        endpoints.vocabulary_rows = vocabulary_rows  # the rank may be one that did not check them

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """The K most likely tokens in the place of each of the n, the most likely first.

        Raises TeacherError, and stops using the servers, if a rollout cannot be scored.
        """
        nothing = TopkScores(torch.empty(0, self._top_k, dtype=torch.int64), torch.empty(0, self._top_k))
        answers = self._endpoints.ask_for_each(self._top_tokens, rollouts, nothing)
        return [scores.to(self._device) for scores in answers]

    def _top_tokens(self, rollout: Rollout) -> TopkScores:
        first = len(rollout.draw.prompt.token_ids)
        ids, log_probs = self._endpoints.top_tokens(rollout.token_ids, first, rollout.sample_id)
        return TopkScores(torch.from_numpy(ids), torch.from_numpy(log_probs).float())
