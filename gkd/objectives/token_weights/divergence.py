"""Weights by how far student and teacher are apart: with D the term's own divergence of the token, in nats,

threshold tau              1 where D >= tau, else 0
proportional, with d_max   min(1, D / d_max)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from gkd.objectives.token_weights.threshold import ThresholdOrProportional

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import RowMeasures


class DivergenceWeight(ThresholdOrProportional):
    needs_divergence: ClassVar[bool] = True

    threshold: float | None = Field(None, ge=0.0, description="in nats")
    d_max: float | None = Field(None, gt=0.0, description="proportional: from there on the weight is 1")

    @model_validator(mode="after")
    def _d_max_is_of_proportional(self) -> DivergenceWeight:
        if self.proportional != (self.d_max is not None):
            raise ValueError("d_max: belongs to proportional: true, which needs it")
        return self

    def of_rows(self, rows: RowMeasures) -> Tensor:
        divergence = rows.term_divergence()
        return self.above(divergence) if self.d_max is None else (divergence / self.d_max).clamp(max=1.0)
