"""The student's own samples, on policy."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.rollout.sources.base import Source
from gkd.seeding import derive_seed
from gkd.types import PromptDraw, Rollout, SampleRequest


class StudentSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With log-probabilities and the version of the weights."""
        context, sampler = self.context, self.context.sampler
        requests = [
            SampleRequest(d.prompt.token_ids, derive_seed(context.seed, "sample", step, d.prompt.index, d.sample_index))
            for d in draws
        ]
        completions = sampler.generate(requests, context.settings(step))
        return [
            Rollout(draw, self.name, completion.token_ids, completion.logprobs, sampler.weights_version)
            for draw, completion in zip(draws, completions, strict=True)
        ]
