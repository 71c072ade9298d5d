"""Texts that student and teacher draw in turns: teacher-mixed sampling (MiniLLM, arXiv 2306.08543).

Each token is drawn from a P + (1 - a) Q given the text so far, P the teacher, Q the student, both over the ids that
they share, a the teacher's share: a coin for each position says whose turn it is, which depends on (seed, step, prompt,
sample, position) alone. So the student runs to the teacher's next turn, and nothing that it draws is thrown away.

The student's texts do not run into what the teacher would never say, and what the loss says of a token can be weighed
by Q / (a P + (1 - a) Q), as `policy_gradient` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gkd.rollout.sources.together import TogetherSource
from gkd.seeding import derive_uniform
from gkd.types import PromptDraw, Rollout


class MixedSource(TogetherSource):
    judges_ends = False

    @property
    def _share(self) -> float:
        return self.context.options.mixed.teacher_share

    def proposal_tokens(self, seed: int, place: int, room: int) -> int:
        """Up to the teacher's next turn."""
        turns = (derive_uniform(seed, "coin", place + count) < self._share for count in range(room))
        return next((count for count, is_teachers in enumerate(turns) if is_teachers), room)

    def places(self, proposed: int) -> range:
        return range(proposed, proposed + 1)

    def teachers_place(self, proposal: Sequence[int], logits: torch.Tensor) -> int:
        return len(proposal)

    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With the teacher's share, too."""
        return [replace(rollout, teacher_share=self._share) for rollout in super().complete(draws, step)]
