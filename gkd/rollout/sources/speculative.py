"""Texts of the student that the teacher corrects: speculative knowledge distillation (arXiv 2410.11325, algorithm 1).

The student proposes `block_tokens` tokens. The first one that is not among the teacher's `top_k` most likely ones is
replaced by a draw from the teacher's whole distribution (which may bring the same token back), what the student wrote
behind it is thrown away, and it goes on from there. So each token is drawn, given the text so far, from

    Q(y) [y in K] + (1 - Q(K)) P(y),

P the teacher and Q the student, both over the ids that they share, at temperature 1 and without truncation, K the ids
of which fewer than `top_k` are more likely to the teacher. The block's length changes how often the teacher reads a
text, and not this. As the student learns, the teacher replaces less, and the texts become its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gkd.rollout.sources.together import TogetherSource


class SpeculativeSource(TogetherSource):
    judges_ends = True

    def proposal_tokens(self, seed: int, place: int, room: int) -> int:
        return min(self.context.options.speculative.block_tokens, room)

    def places(self, proposed: int) -> range:
        return range(proposed)

    def teachers_place(self, proposal: Sequence[int], logits: torch.Tensor) -> int | None:
        own = logits.gather(1, torch.tensor(proposal, device=logits.device)[:, None])  # [n, 1]
        is_outside = (logits > own).sum(1) >= self.context.options.speculative.top_k
        return int(is_outside.int().argmax()) if bool(is_outside.any()) else None
