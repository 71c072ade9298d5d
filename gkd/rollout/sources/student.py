"""The student's own samples, on policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gkd.rollout.sources.base import Source
from gkd.types import PromptDraw, Rollout


class StudentSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With log-probabilities and the version of the weights; conversations, where there is an environment."""
        requests, settings = self.requests(draws, step, "sample"), self.context.settings(step)
        sampler, conversations = self.context.sampler, self.context.conversations
        if conversations is None:
            return self.sampled(draws, sampler.generate(requests, settings))
        held = conversations.hold(draws, requests, settings, sampler, step)
        rollouts = self.sampled(draws, [one.completion for one in held])
        return [
            replace(rollout, conversation=one.conversation, reward=one.reward)
            for rollout, one in zip(rollouts, held, strict=True)
        ]
