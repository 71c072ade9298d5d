"""What terms about a whole global batch have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import model_validator

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.batch_losses import BatchLoss


class BatchTerm(Term):
    """A term that compares sequences of the global batch with one another, by a vector of each, and has no row loss.

    All vectors are found first, by a forward without a gradient; then each micro-batch takes its part of the gradient
    with respect to them (gradient cache, Gao et al., arXiv 2101.06983). So how the batch is split does not matter.
    """

    def batch_loss(self, values: Mapping[str, float]) -> BatchLoss:
        """What it says of all vectors, given what `schedules` are at the step."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _weighs_no_tokens(self) -> BatchTerm:
        if self.token_weight:
            raise ValueError(f"token_weight: weighs distributions over the vocabulary, which {self.kind} does not see")
        return self
