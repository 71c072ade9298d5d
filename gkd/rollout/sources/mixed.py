"""Texts that student and teacher draw together: teacher-mixed sampling (MiniLLM, arXiv 2306.08543).

Each token is drawn from a P + (1 - a) Q given the text so far, P the teacher, Q the student, a the teacher's share: a
coin for each position says whose turn it is, which depends on (seed, step, prompt, sample, position) alone. So the
student's texts do not run into what the teacher would never say, and what the loss says of the teacher's tokens can be
weighed by Q / (a P + (1 - a) Q), as `policy_gradient` does.
"""

from __future__ import annotations

from collections.abc import Sequence

from gkd.rollout.sources.base import Source
from gkd.types import PromptDraw, Rollout


class MixedSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With the student's log-probabilities of all tokens, the version of its weights, and the teacher's share."""
        context = self.context
        assert context.teacher_logits is not None
        completions = context.sampler.generate_mixed(
            self.requests(draws, step, "mixed"), context.settings(step), context.teacher_logits, context.teacher_share
        )
        return self.sampled(draws, completions, context.teacher_share)
