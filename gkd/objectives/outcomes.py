"""What two vocabularies have in common, as outcomes of which both sides have a logit.

Legend: n rows, V a side's vocabulary, K pairs of ids that stand for the same, C outcomes, T temperature.

shared      An outcome's logit is the K shared ones' own, and one for everything else of that side: T log sum e^(s/T)
            over the rest, so that softmax(z / T) over the outcomes has exactly the probabilities that softmax(s / T)
            gives them. With G the gradient of a loss with respect to z,
                g_j = G_k for the j of pair k,   g_j = G_rest softmax_rest(s / T)_j elsewhere.
projection  Each of the student's ids goes to one of the teacher's: its probabilities times a matrix of 0 and 1 whose
            rows sum to 1. An outcome is a token of the teacher that some id goes to, the rest is as above:
                z_k = T log sum e^(s_j/T) over the j that go to k,   g_j = G_k e^((s_j - z_k)/T).
uld         The k-th outcome is the k-th likeliest token of either side (Boizard et al., arXiv 2402.12030): sorted
            logits, those of the smaller vocabulary followed by -inf.

A side that has nothing but shared ids has a bucket where the other has one: of EMPTY_BUCKET, or a reverse KL against it
would be infinite. Where neither has anything else there is no bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

EMPTY_BUCKET = 2.0**-23  # float32's epsilon


class Outcomes(Protocol):
    """How logits of two vocabularies become logits of the same outcomes."""

    count: int  # C
    student_columns: int
    teacher_columns: int

    def of_student(self, logits: Tensor, temperature: float) -> Tensor:
        """[n, C] of [n, V], which are left as they are."""
        ...

    def of_teacher(self, logits: Tensor, temperature: float) -> Tensor: ...

    def student_gradient(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """[n, V] by the student's logits [n, V], of a gradient [n, C] by what `of_student` made of them."""
        ...


class SharedOutcomes:
    """Implements `Outcomes`: the shared ids, and a bucket a side for all others."""

    def __init__(
        self,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
        student_columns: int,
        teacher_columns: int,
        device: torch.device,
    ) -> None:
        """Pairs with an id that has no column are left out."""
        pairs = _with_columns(student_ids, teacher_ids, student_columns, teacher_columns)
        self.student_columns, self.teacher_columns = student_columns, teacher_columns
        has_bucket = max(student_columns, teacher_columns) > len(pairs)
        self.count = len(pairs) + has_bucket
        self._student = _Side([student for student, _ in pairs], student_columns, has_bucket, device)
        self._teacher = _Side([teacher for _, teacher in pairs], teacher_columns, has_bucket, device)

    def of_student(self, logits: Tensor, temperature: float) -> Tensor:
        return self._student.outcomes(logits, temperature)

    def of_teacher(self, logits: Tensor, temperature: float) -> Tensor:
        return self._teacher.outcomes(logits, temperature)

    def student_gradient(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        return self._student.gradient(gradient, logits, temperature)


def _with_columns(
    student_ids: Sequence[int], teacher_ids: Sequence[int], student_columns: int, teacher_columns: int
) -> list[tuple[int, int]]:
    """The pairs whose ids both have a column."""
    return [
        (student, teacher)
        for student, teacher in zip(student_ids, teacher_ids, strict=True)
        if student < student_columns and teacher < teacher_columns
    ]


class _Side:
    def __init__(self, ids: Sequence[int], columns: int, has_bucket: bool, device: torch.device) -> None:
        is_other = torch.ones(columns, dtype=torch.bool)
        shared = torch.tensor(ids, dtype=torch.int64)
        is_other[shared] = False
        self._is_empty, self._has_bucket = len(ids) == columns, has_bucket
        others = torch.arange(columns) if self._is_empty else is_other.nonzero()[:, 0]
        self._shared, self._others = shared.to(device), others.to(device)

    def outcomes(self, logits: Tensor, temperature: float) -> Tensor:
        found = logits.new_empty(len(logits), len(self._shared) + self._has_bucket)
        found[:, : len(self._shared)] = logits.index_select(1, self._shared)
        if self._has_bucket:
            bucket = logits.index_select(1, self._others).div_(temperature).logsumexp(-1)
            found[:, -1] = (bucket + math.log(EMPTY_BUCKET) if self._is_empty else bucket) * temperature
        return found

    def gradient(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        found = torch.zeros_like(logits)
        if self._has_bucket:
            of_bucket = logits.index_select(1, self._others).div_(temperature).softmax(-1)
            found.index_copy_(1, self._others, of_bucket.mul_(gradient[:, -1:]))
        return found.index_add_(1, self._shared, gradient[:, : len(self._shared)])


class ProjectedOutcomes:
    """Implements `Outcomes`: the teacher's tokens that the student's go to, and a bucket a side for all others."""

    def __init__(
        self,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
        student_columns: int,
        teacher_columns: int,
        device: torch.device,
    ) -> None:
        """Pairs with an id that has no column are left out."""
        goes_to = dict(_with_columns(student_ids, teacher_ids, student_columns, teacher_columns))
        reached = sorted({*goes_to.values()})
        place = {teacher: index for index, teacher in enumerate(reached)}
        self.student_columns, self.teacher_columns = student_columns, teacher_columns
        self._is_empty = len(goes_to) == student_columns  # the student's bucket
        has_bucket = not self._is_empty or len(reached) < teacher_columns
        self.count = len(reached) + has_bucket
        self._has_empty_bucket = has_bucket and self._is_empty
        self._teacher = _Side(reached, teacher_columns, has_bucket, device)
        outcome = [place[goes_to[i]] if i in goes_to else len(reached) for i in range(student_columns)]
        self._outcome = torch.tensor(outcome, device=device)  # [V] of each of the student's ids

    def of_student(self, logits: Tensor, temperature: float) -> Tensor:
        index, scaled = self._outcome.expand(len(logits), -1), logits / temperature
        largest = logits.new_full((len(logits), self.count), -math.inf).scatter_reduce_(1, index, scaled, "amax")
        above = (scaled - largest.gather(1, index)).exp_()
        found = torch.zeros_like(largest).scatter_add_(1, index, above).log_().add_(largest)
        if self._has_empty_bucket:
            found[:, -1] = scaled.logsumexp(-1) + math.log(EMPTY_BUCKET)
        return found * temperature

    def of_teacher(self, logits: Tensor, temperature: float) -> Tensor:
        return self._teacher.outcomes(logits, temperature)

    def student_gradient(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        index = self._outcome.expand(len(logits), -1)
        outcomes = self.of_student(logits, temperature)
        found = ((logits - outcomes.gather(1, index)) / temperature).exp_().mul_(gradient.gather(1, index))
        if self._has_empty_bucket:
            found += (logits / temperature).softmax(-1) * gradient[:, -1:]
        return found


class RankedOutcomes:
    """Implements `Outcomes`: the k-th likeliest of either side, whatever it spells."""

    def __init__(self, student_columns: int, teacher_columns: int) -> None:
        self.student_columns, self.teacher_columns = student_columns, teacher_columns
        self.count = max(student_columns, teacher_columns)

    def of_student(self, logits: Tensor, temperature: float) -> Tensor:
        return self._ranked(logits)

    def of_teacher(self, logits: Tensor, temperature: float) -> Tensor:
        return self._ranked(logits)

    def student_gradient(self, gradient: Tensor, logits: Tensor, temperature: float) -> Tensor:
        order = logits.argsort(stable=True, dim=-1, descending=True)
        return torch.empty_like(logits).scatter_(1, order, gradient[:, : self.student_columns])

    def _ranked(self, logits: Tensor) -> Tensor:
        found = logits.new_full((len(logits), self.count), -math.inf)
        found[:, : logits.shape[1]] = logits.sort(stable=True, dim=-1, descending=True).values
        return found
