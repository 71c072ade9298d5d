"""What a weight of tokens may look at.

Legend: n rows of a segment, N scored tokens of a micro-batch, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowMeasures:
    """Of n rows and one term; everything is detached and at the objective's temperature. Raw logits are not divided."""

    kind: str  # of the term
    vocabulary: int
    temperature: float
    measure: Callable[[str], Tensor]  # by name in gkd.objectives.BYPRODUCTS, [n]
    term_divergence: Callable[[], Tensor]  # [n]
    logits: Callable[[], tuple[Tensor, Tensor]]  # student's and teacher's, [n, V]


@dataclass(frozen=True)
class SequenceMeasures:
    """Of all scored tokens of a micro-batch, at temperature 1. Natural log-probabilities of the tokens themselves."""

    student_logprobs: Tensor  # [N] float32
    teacher_logprobs: Tensor | None  # [N] float32; None unless a weight needs them
    sampler_logprobs: Tensor  # [N] float32; NaN where the student's sampler did not draw the token
    sequence_index: Tensor  # [N] int64 below S
    sequences: int  # S
    teacher_share: Tensor | None = None  # [N] of `TokenBatch`
    rewards: Tensor | None = None  # [S, 3] float64: what each sequence earned, its group's mean and deviation, or NaN
