"""Early tokens of a sequence weigh more, the sooner its text drifts from the teacher (IW-OPD, arXiv 2606.22600).

With a_t = log p_teacher - log p_student of the sequence's token t, at temperature 1,

    w_t = 1 + gamma (1 - sum_{i < t} |a_i| / sum_i |a_i|),

so that the first token has 1 + gamma, and the weight falls to 1 as the drift is used up. Where nothing drifts all have
1 + gamma.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gkd.objectives.token_weights.base import SequenceWeight

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import SequenceMeasures


class Drift(SequenceWeight):
    needs_teacher: ClassVar[bool] = True
    needs_teacher_logprobs: ClassVar[bool] = True
    needs_whole_teacher: ClassVar[bool] = True

    gamma: float = Field(0.5, ge=0.0, description="how much more the first token of a sequence weighs")

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        assert sequences.teacher_logprobs is not None
        drift = (sequences.teacher_logprobs.double() - sequences.student_logprobs.double()).abs()  # [N]
        index = sequences.sequence_index
        totals = drift.new_zeros(sequences.sequences).index_add_(0, index, drift)  # [S]
        before = drift.cumsum(0) - drift - (totals.cumsum(0) - totals)[index]  # of the sequence, [N]
        share = before / totals[index].clamp(min=1e-300)
        return (1.0 + self.gamma * (1.0 - share.clamp(0.0, 1.0))).float()
