"""How the sequences of a global batch lie to one another, in the student as in the teacher.

Relational knowledge distillation (Park et al., arXiv 1904.05068, section 3.2). v_i is the mean of the last states of
sequence i's scored tokens, mu the mean of |v_i - v_j| over pairs, e_ij the unit vector from v_j to v_i, each of its
own side, and l the Huber loss:

    distance:  mean over pairs i, j of l(|v_i - v_j| / mu of the teacher, the same of the student)
    angle:     mean over triples i, j, k of l(e_ij . e_kj of the teacher, the same of the student)

    value of the batch = distance x (the first) + angle x (the second)

It stands in the place of the value of each token: so the loss holds weight x value, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from gkd.objectives.terms.batch import BatchTerm

if TYPE_CHECKING:
    from gkd.objectives.batch_losses import BatchLoss


class RelationalDistillation(BatchTerm):
    """Distances and angles among one vector a sequence; those without a scored token have none."""

    whole_teacher_only: ClassVar[bool] = True

    distance: float = Field(1.0, ge=0.0, description="weight of the distances")
    angle: float = Field(2.0, ge=0.0, description="weight of the angles")

    @model_validator(mode="after")
    def _says_something(self) -> RelationalDistillation:
        if self.distance == self.angle == 0.0:
            raise ValueError("angle: it and distance are both 0; nothing would be compared")
        return self

    def batch_loss(self, values: Mapping[str, float]) -> BatchLoss:
        from gkd.objectives.batch_losses import rkd_loss  # torch loads here, not with a config

        return rkd_loss(self.distance, self.angle)
