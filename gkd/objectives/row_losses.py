"""What a term of the objective says of one row: the forms that the pass over the vocabulary knows.

Legend: n rows (scored tokens), N scored tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor

from gkd.objectives.divergence import Divergence
from gkd.objectives.measures import SequenceMeasures


@dataclass(frozen=True)
class LabelLoss:
    """-factor log Q(label); 0 in a row without a label. A factor below 0 is allowed.

    With a factor of 1 at temperature 1 it shares the call of a divergence of the same rows, and no row's weight may be
    below 0.
    """

    factor: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class ReferenceLoss:
    """A divergence with the initial student in the teacher's place."""

    divergence: Divergence


@dataclass(frozen=True)
class RowFunction:
    """Any loss of a row, as plain differentiable PyTorch: for what has no closed form and no kernel.

    `value(student_logits, teacher_logits, labels)` -> [n], from [n, V], [n, V] and [n]; raw logits in float32 or
    float64, -1 for no label, None for the teacher where the term does not need one. It is called on tiles of rows, so a
    row's value must not depend on the others.
    """

    value: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    needs_teacher: bool = True


RowLoss: TypeAlias = Divergence | LabelLoss | ReferenceLoss | RowFunction


class OfSequences(Protocol):
    """Numbers of tokens that need the log-probabilities of whole sequences first: one more product a side."""

    needs_teacher_logprobs: ClassVar[bool]

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        """[N], detached. Tokens of a sequence stand together, in order."""
        ...


@dataclass(frozen=True)
class Part:
    """One row loss of a term. The term's value is the sum over its parts of factor x value."""

    loss: RowLoss
    factor: OfSequences | None = None  # None is 1
