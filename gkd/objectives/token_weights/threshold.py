"""The two forms that a weight by a measure takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from gkd.objectives.token_weights.base import RowWeight

if TYPE_CHECKING:
    from torch import Tensor


class ThresholdOrProportional(RowWeight):
    """{threshold: tau} or {proportional: true}: exactly one of them."""

    threshold: float | None = None
    proportional: bool = Field(False, description="instead of a threshold")

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> ThresholdOrProportional:
        if (self.threshold is None) != self.proportional:
            raise ValueError("threshold: give either a threshold or proportional: true")
        return self

    def above(self, measure: Tensor) -> Tensor:
        """1 where it is at least the threshold, else 0."""
        assert self.threshold is not None
        return (measure >= self.threshold).to(measure.dtype)
