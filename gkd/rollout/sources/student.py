"""The student's own samples, on policy."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.rollout.sources.base import Source
from gkd.types import PromptDraw, Rollout


class StudentSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With log-probabilities and the version of the weights."""
        requests = self.requests(draws, step, "sample")
        return self.sampled(draws, self.context.sampler.generate(requests, self.context.settings(step)))
