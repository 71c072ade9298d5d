"""Tokens on which the student is uncertain, or sure and wrong (TIP, arXiv 2604.14084).

h + d - h d, with h = H_student / log V and d = min(1, D / d_max), D the term's own divergence. d_max is a fixed number,
so that a token's weight does not depend on what else is in its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gkd.objectives.token_weights.base import RowWeight
from gkd.objectives.token_weights.entropy import log_of

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import RowMeasures


class UncertainOrWrong(RowWeight):
    needs_divergence: ClassVar[bool] = True

    d_max: float = Field(2.0, gt=0.0, description="divergence from which on a token counts as wrong, in nats")

    def of_rows(self, rows: RowMeasures) -> Tensor:
        uncertain = rows.measure("student_entropy") / log_of(rows.vocabulary)
        wrong = (rows.term_divergence() / self.d_max).clamp(max=1.0)
        return uncertain + wrong - uncertain * wrong
