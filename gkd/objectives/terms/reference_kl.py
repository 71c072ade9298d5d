"""KL between the student and the student as it was before training: an anchor.

    reverse   KL(Q || R)   g = Q (log Q - log R - KL)      forward   KL(R || Q)   g = Q - R

with Q the student's distribution of a token and R that of the initial student, both at temperature 1, whatever the
objective's: it is the distribution that is sampled from that is held. On the student's own samples the reverse KL is
the penalty of reinforcement learning from preferences (Ziegler et al. 2019, arXiv 1909.08593), taken exactly over the
vocabulary instead of by the sampled token; beside on-policy distillation it holds lengths (arXiv 2604.08527).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.row_losses import ReferenceLoss


class ReferenceKl(Term):
    """D(initial student, student) of each token of the student's samples."""

    needs_teacher: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    direction: Literal["reverse", "forward"] = Field(
        "reverse", description="KL(student || initial student), or the other way"
    )
    on: list[str] | None = Field(["student"], description="whose completions it is for; null = all")

    def loss(self, values: Mapping[str, float], temperature: float) -> ReferenceLoss:
        from gkd.objectives.divergence import Divergence
        from gkd.objectives.row_losses import ReferenceLoss

        return ReferenceLoss(Divergence(f"{self.direction}_kl"))
