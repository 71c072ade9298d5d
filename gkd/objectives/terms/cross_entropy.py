"""Cross-entropy of the tokens themselves: supervised training on whatever text it is `on`.

On a data set's completions it is the hard half of Hinton et al. (arXiv 1503.02531, section 2); on a teacher's texts it
is sequence-level distillation (Kim and Rush, arXiv 1606.07947).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.row_losses import LabelLoss


class CrossEntropy(Term):
    """-log Q(token) at temperature 1, whatever the objective's temperature is. In nats."""

    needs_teacher: ClassVar[bool] = False

    def loss(self, values: Mapping[str, float], temperature: float) -> LabelLoss:
        from gkd.objectives.row_losses import LabelLoss

        return LabelLoss()
