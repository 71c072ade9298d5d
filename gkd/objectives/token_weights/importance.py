"""Truncated importance weights, for tokens that an older or otherwise different student sampled.

min(r, cap) with r = p_trainer / p_sampler (Ionides 2008): of the token, or the product over its whole sequence. 1 for
tokens that the student's sampler did not draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gkd.objectives.token_weights.base import SequenceWeight

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import SequenceMeasures


class Importance(SequenceWeight):
    level: Literal["token", "sequence"] = Field("token", description="whose ratio: the token's, or its sequence's")
    cap: float = Field(2.0, gt=0.0, description="largest weight")

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        from gkd.objectives.mismatch import importance_weights, log_ratios

        log_ratio = log_ratios(sequences.student_logprobs, sequences.sampler_logprobs)
        return importance_weights(log_ratio, sequences.sequence_index, sequences.sequences, self.level, self.cap)
