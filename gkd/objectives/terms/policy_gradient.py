"""Policy gradient on the student's own samples.

    value = -A log Q(token) at temperature 1,   gradient with respect to the logits = A (Q - onehot(token)).

REINFORCE (Williams 1992, Machine Learning 8) for one sample of each token's action, without a clipped ratio: at the
step that sampled it the ratio is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.row_losses import LabelLoss


class PolicyGradient(Term):
    """-A log Q(token) of tokens that the student sampled; the advantage A is the same number for all of them.

    With A = -1 it lowers whatever was sampled: the control that asks how much of on-policy distillation by the reverse
    KL, whose advantages are mostly negative, needs no teacher.
    """

    needs_teacher: ClassVar[bool] = False
    on_policy_only: ClassVar[bool] = True
    is_nonnegative: ClassVar[bool] = False

    advantage: Literal["constant"] = Field("constant", description="where a token's advantage comes from")
    constant: float = Field(-1.0, description="the advantage of every token")

    def loss(self, values: Mapping[str, float], temperature: float) -> LabelLoss:
        from gkd.objectives.row_losses import LabelLoss

        return LabelLoss(self.constant)
