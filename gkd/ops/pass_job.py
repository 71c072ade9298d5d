"""What one pass over the vocabulary is given.

Legend: N rows (scored tokens), n rows of a segment, V vocabulary (columns that are compared), K losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.measures import RowMeasures
from gkd.objectives.outcomes import Outcomes
from gkd.objectives.row_losses import ReferenceLoss, RowFunction, RowLoss
from gkd.ops.heads import Head
from gkd.ops.row_calls import KL_MEASURES, Call, plan_calls
from gkd.types import TopkScores

LABEL_LOGPROB = "label_logprob"  # a by-product: log Q(label) at temperature 1, 0 without a label
ALIGNED_MEASURES = ("aligned_forward_kl", "aligned_reverse_kl", "aligned_top1")
"""Against another vocabulary: of the outcomes that a span has for both sides."""
TOPK_MEASURES = ("student_entropy", "top1_agreement", "topk_forward_kl", "topk_reverse_kl")
"""From a top k: the first two are of the student's whole distribution, the last two of K tokens and one bucket."""


@dataclass(frozen=True)
class WeightedLoss:
    """One loss of the rows, and what its gradient is multiplied by."""

    loss: RowLoss
    weights: Tensor | None = None  # [N]; None is 1
    row_weights: tuple[Callable[[RowMeasures], Tensor], ...] = ()  # each [n], of a segment's rows
    kind: str = ""  # for `row_weights`

    @property
    def needs_teacher(self) -> bool:
        if self.row_weights or isinstance(self.loss, Divergence):
            return True
        return isinstance(self.loss, RowFunction) and self.loss.needs_teacher


@dataclass(frozen=True)
class Group:
    """Consecutive rows that have the same losses, by number."""

    rows: slice
    losses: tuple[int, ...]


@dataclass(frozen=True)
class PassJob:
    """Everything that a pass needs. Groups with a teacher come first."""

    student: Head
    teacher: Head | TopkScores | None
    columns: int
    temperature: float
    losses: tuple[WeightedLoss, ...]
    groups: tuple[Group, ...]
    labels: Tensor | None  # [N]
    measures: bool
    compute_dtype: torch.dtype | None
    chunk_bytes: int
    ignored: Tensor | None = None  # [N] weights whose zeros must not be looked at
    reference: Head | None = None  # the initial student, for losses that compare with it
    outcomes: Outcomes | None = None  # what the columns are, where they are not the heads' own; labels and top k: none

    @cached_property
    def dtype(self) -> torch.dtype:
        if self.compute_dtype == torch.float64:
            return torch.float64
        sides = [side for side in (self.student, self.teacher, self.reference) if isinstance(side, Head)]
        return working_dtype(*(tensor for head in sides for tensor in (head.hidden, head.weight)))

    @property
    def student_columns(self) -> int:
        """Of the student's logits."""
        return self.columns if self.outcomes is None else self.outcomes.student_columns

    @property
    def teacher_columns(self) -> int:
        return self.columns if self.outcomes is None else self.outcomes.teacher_columns

    @cached_property
    def measure_names(self) -> tuple[str, ...]:
        if not self.measures:
            return ()
        of_teacher = KL_MEASURES if isinstance(self.teacher, Head) else TOPK_MEASURES if self.teacher else ()
        return of_teacher if self.labels is None else (*of_teacher, LABEL_LOGPROB)

    @cached_property
    def teacher_rows(self) -> int:
        """How many rows, from the first on, are compared with the teacher."""
        return max((g.rows.stop for g in self.groups if any(self.losses[i].needs_teacher for i in g.losses)), default=0)

    @cached_property
    def reference_rows(self) -> list[slice]:
        """The rows that are compared with the initial student."""
        return [g.rows for g in self.groups if any(isinstance(self.losses[i].loss, ReferenceLoss) for i in g.losses)]

    @cached_property
    def calls(self) -> tuple[list[Call], ...]:
        """Of each group."""
        whole = isinstance(self.teacher, Head)
        return tuple(plan_calls({i: self.losses[i].loss for i in group.losses}, whole) for group in self.groups)

    def chunks(self) -> Iterator[slice]:
        """As few chunks as chunk_bytes allows, of about equal size."""
        n_rows = self.student.hidden.shape[0]
        widest = max(self.student_columns, self.teacher_columns)
        at_most = max(1, self.chunk_bytes // (widest * self.dtype.itemsize))
        n_chunks = -(-n_rows // at_most)
        for index in range(n_chunks):
            yield slice(index * n_rows // n_chunks, (index + 1) * n_rows // n_chunks)
