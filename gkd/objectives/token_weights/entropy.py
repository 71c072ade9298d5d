"""Weights by how uncertain a model is about the token.

With H the entropy of its distribution at the objective's temperature, in nats, and V the vocabulary:

    threshold tau    1 where H >= tau, else 0
    proportional     H / log V

Entropy-aware distillation (arXiv 2603.07079) is the reverse KL everywhere plus the forward KL where the teacher's
entropy is above a threshold: two terms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gkd.objectives.token_weights.threshold import ThresholdOrProportional

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import RowMeasures


class _Entropy(ThresholdOrProportional):
    threshold: float | None = Field(None, ge=0.0, description="in nats")

    _of: ClassVar[str]

    def of_rows(self, rows: RowMeasures) -> Tensor:
        entropy = rows.measure(self._of)
        return self.above(entropy) if self.threshold is not None else entropy / log_of(rows.vocabulary)


class TeacherEntropy(_Entropy):
    needs_whole_teacher: ClassVar[bool] = True
    _of: ClassVar[str] = "teacher_entropy"


class StudentEntropy(_Entropy):
    _of: ClassVar[str] = "student_entropy"


def log_of(vocabulary: int) -> float:
    """log V; of one token alone, whose entropy is 0, anything above 0 will do."""
    return math.log(max(2, vocabulary))
