"""What a token's text costs from there on, against a teacher: the policy gradient's advantage, with its sign turned.

Of the token t of a text of T tokens, with Q the student, P the teacher, all detached and at temperature 1,

    c_t = log Q(token t) - log P(token t)            the reward of MiniLLM (arXiv 2306.08543) is -c_t
    C_t = sum of c_i over i > t (or i >= t)          the cost to go; divided by the number of its terms, if so wanted

Where the token was drawn from a P + (1 - a) Q (teacher-mixed sampling), what is said of it is weighed by

    w_t = Q(token t) / (a P(token t) + (1 - a) Q(token t)),

which is at most 1 / (1 - a): that of the token alone, as published, in the place of the product over all before it.

Legend: N scored tokens of a micro-batch, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gkd.objectives.measures import SequenceMeasures
from gkd.objectives.mismatch import log_ratios

_LEAST_DEVIATION = 1e-6  # added to that of a group's rewards


@dataclass(frozen=True)
class MixedImportance:
    """The weight w_t; 1 where the student drew by itself."""

    needs_teacher_logprobs: ClassVar[bool] = True

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        """[N], in the log-probabilities' dtype."""
        assert sequences.teacher_logprobs is not None
        if sequences.teacher_share is None:
            return torch.ones_like(sequences.student_logprobs)
        share = sequences.teacher_share.double()
        ratio = (sequences.teacher_logprobs.double() - sequences.student_logprobs.double()).exp()  # P / Q
        weight = 1.0 / (1.0 - share + torch.where(share > 0, share * ratio, 0.0))
        return weight.to(sequences.student_logprobs.dtype)


@dataclass(frozen=True)
class CostToGo:
    """A factor of log Q(token): their product is minus the gain of a policy gradient."""

    needs_teacher_logprobs: ClassVar[bool] = True

    includes_own: bool  # i >= t
    is_mean: bool  # divided by the number of terms
    clip_range: float | None  # of `clipped`; None: there is no ratio

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        """[N], in the log-probabilities' dtype."""
        assert sequences.teacher_logprobs is not None
        cost = sequences.student_logprobs.double() - sequences.teacher_logprobs.double()  # [N]
        to_go = self._sum_to_go(cost, sequences)
        if self.is_mean:
            to_go = to_go / self._sum_to_go(torch.ones_like(cost), sequences).clamp(min=1.0)
        if self.clip_range is not None:
            ratio = log_ratios(sequences.student_logprobs, sequences.sampler_logprobs).exp()
            to_go = clipped(to_go, ratio, self.clip_range)
        return to_go.to(sequences.student_logprobs.dtype)

    def _sum_to_go(self, values: Tensor, sequences: SequenceMeasures) -> Tensor:
        """Of each token those of its sequence from there on, [N]."""
        index = sequences.sequence_index
        totals = values.new_zeros(sequences.sequences).index_add_(0, index, values)  # [S]
        later = totals.cumsum(0)[index] - values.cumsum(0)
        return later + values if self.includes_own else later


@dataclass(frozen=True)
class RewardCost:
    """Minus the advantage of a text among its prompt's samples, the same at each of its tokens: a factor of
    log Q(token). 0 where nobody judged it.

    The advantage is (r - mean) / (deviation + 1e-6) (GRPO, arXiv 2402.03300), or r - mean (Dr. GRPO, 2503.20783).
    """

    needs_teacher_logprobs: ClassVar[bool] = False

    is_normalized: bool  # by the deviation
    clip_range: float | None  # of `clipped`; None: there is no ratio

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        """[N], in the log-probabilities' dtype."""
        own = sequences.student_logprobs
        if sequences.rewards is None:
            return torch.zeros_like(own)
        reward, mean, deviation = sequences.rewards.unbind(1)  # [S]
        cost = (mean - reward) / (deviation + _LEAST_DEVIATION if self.is_normalized else 1.0)
        cost = cost.nan_to_num(0.0)[sequences.sequence_index]  # [N]
        if self.clip_range is not None:
            cost = clipped(cost, log_ratios(own, sequences.sampler_logprobs).exp(), self.clip_range)
        return cost.to(own.dtype)


def clipped(cost: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """The factor [N] of log Q(token) that has the gradient of PPO's clipped surrogate (Schulman et al. 2017, arXiv
    1707.06347), max(r C, clip(r, 1 - e, 1 + e) C): r C where the ratio r = Q / Q_sampler has not yet gone further than
    e the way that C pushes it, else 0.
    """
    too_far = torch.where(cost < 0, ratio > 1.0 + clip_range, ratio < 1.0 - clip_range)
    return torch.where(too_far, 0.0, ratio * cost)
