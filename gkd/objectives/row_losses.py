"""What a term of the objective says of one row: the forms that the pass over the vocabulary knows.

Legend: n rows (scored tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from gkd.objectives.divergence import Divergence


@dataclass(frozen=True)
class LabelLoss:
    """-factor log Q(label) at temperature 1; 0 in a row without a label. A factor below 0 is allowed."""

    factor: float = 1.0


@dataclass(frozen=True)
class RowFunction:
    """Any loss of a row, as plain differentiable PyTorch: for what has no closed form and no kernel.

    `value(student_logits, teacher_logits, labels)` -> [n], from [n, V], [n, V] and [n]; raw logits in float32 or
    float64, -1 for no label, None for the teacher where the term does not need one. It is called on tiles of rows, so a
    row's value must not depend on the others.
    """

    value: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    needs_teacher: bool = True


RowLoss: TypeAlias = Divergence | LabelLoss | RowFunction
