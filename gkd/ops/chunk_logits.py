"""The logits of a pass, chunk by chunk: those of the heads, or of outcomes that two vocabularies have in common.

Legend: n rows of a chunk, V vocabulary, C outcomes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gkd.objectives.outcomes import Outcomes
from gkd.ops import scratch
from gkd.ops.heads import Head
from gkd.ops.matmul import HeadProduct
from gkd.ops.pass_job import PassJob
from gkd.ops.row_calls import Rows
from gkd.types import TopkScores


class ChunkLogits(Protocol):
    """One chunk after the other; what is of one is gone with the next."""

    student_product: HeadProduct

    def of(self, chunk: slice) -> tuple[Rows, Tensor | None]:
        """What is compared, and memory for the gradient by the student's side of it, where one is wanted."""
        ...

    def pull_back(self, gradient: Tensor) -> Tensor:
        """[n, V] by the student's products with its head, but for the logit scale; overwrites what `of` returned."""
        ...

    def give_back(self) -> None: ...


def chunk_logits(job: PassJob, with_gradient: bool) -> ChunkLogits:
    if job.outcomes is None:
        return _Whole(job, with_gradient)
    return _OfOutcomes(job, job.outcomes, with_gradient)


class _Whole:
    """The [n, V] matrices of a pass, made once. A gradient overwrites the student's logits where it can."""

    def __init__(self, job: PassJob, with_gradient: bool) -> None:
        self._job = job
        teacher = job.teacher if isinstance(job.teacher, Head) else None
        self.student_product = job.student.product(job.columns, job.ignored, job.compute_dtype, job.dtype)
        self._teacher_product = (
            teacher.product(job.columns, job.ignored, job.compute_dtype, job.dtype) if teacher else None
        )
        self._alive = None if job.ignored is None else job.ignored != 0
        largest, device = max((rows.stop - rows.start for rows in job.chunks()), default=0), job.student.hidden.device
        self._reference_product = (
            job.reference.product(job.columns, job.ignored, job.compute_dtype, job.dtype) if job.reference else None
        )
        sides = 1 + (teacher is not None) + (job.reference is not None)
        self._logits = [scratch.take((largest, job.columns), job.dtype, device) for _ in range(sides)]
        self._gradient: Tensor | None = None
        if not with_gradient:
            return
        if job.student.softcap is None:  # a row's gradient lies where its logits were, be it in half of the memory
            dtype = self.student_product.gradient_dtype
            self._gradient = self._logits[0].view(dtype)[:, : job.columns]
        else:  # the cap's derivative needs the logits afterwards
            self._gradient = torch.empty_like(self._logits[0])

    def of(self, chunk: slice) -> tuple[Rows, Tensor | None]:
        job, n = self._job, chunk.stop - chunk.start
        student = job.student.logits(self.student_product, chunk, self._logits[0][:n])
        teacher: Tensor | TopkScores | None = None
        if isinstance(job.teacher, TopkScores):
            teacher = TopkScores(job.teacher.ids[chunk], job.teacher.log_probs[chunk])
        elif job.teacher is not None and self._teacher_product is not None:
            teacher = self._logits[1][:n]
            compared = slice(chunk.start, min(chunk.stop, max(chunk.start, job.teacher_rows)))
            if compared.stop > compared.start:
                job.teacher.logits(self._teacher_product, compared, teacher[: compared.stop - compared.start])
        labels, alive = (None if of_row is None else of_row[chunk] for of_row in (job.labels, self._alive))
        self._student = student
        rows = Rows(student, teacher, labels, alive, self._reference(chunk))
        return rows, None if self._gradient is None else self._gradient[:n]

    def _reference(self, chunk: slice) -> Tensor | None:
        """Only the rows that are compared with it are filled."""
        job = self._job
        if job.reference is None or self._reference_product is None:
            return None
        logits = self._logits[-1][: chunk.stop - chunk.start]
        for rows in job.reference_rows:
            compared = slice(max(chunk.start, rows.start), min(chunk.stop, rows.stop))
            if compared.stop > compared.start:
                here = slice(compared.start - chunk.start, compared.stop - chunk.start)
                job.reference.logits(self._reference_product, compared, logits[here])
        return logits

    def pull_back(self, gradient: Tensor) -> Tensor:
        self._job.student.pull_back_(gradient, self._student)
        return gradient

    def give_back(self) -> None:
        scratch.give_back(*self._logits)


class _OfOutcomes:
    """Logits of outcomes [n, C], and what they are made of: up to twice the memory of whole ones."""

    def __init__(self, job: PassJob, outcomes: Outcomes, with_gradient: bool) -> None:
        assert isinstance(job.teacher, Head)
        self._job, self._outcomes, self._teacher, self._with_gradient = job, outcomes, job.teacher, with_gradient
        self._columns = outcomes.student_columns, outcomes.teacher_columns
        self.student_product, self._teacher_product = (
            head.product(columns, job.ignored, job.compute_dtype, job.dtype)
            for head, columns in zip((job.student, job.teacher), self._columns, strict=True)
        )
        largest, device = max((rows.stop - rows.start for rows in job.chunks()), default=0), job.student.hidden.device
        self._logits = [scratch.take((largest, columns), job.dtype, device) for columns in self._columns]

    def of(self, chunk: slice) -> tuple[Rows, Tensor | None]:
        job, n = self._job, chunk.stop - chunk.start
        self._student = job.student.logits(self.student_product, chunk, self._logits[0][:n])
        student = self._outcomes.of_student(self._student, job.temperature)
        whole = self._teacher.logits(self._teacher_product, chunk, self._logits[1][:n])
        teacher = self._outcomes.of_teacher(whole, job.temperature)
        return Rows(student, teacher, None), torch.empty_like(student) if self._with_gradient else None

    def pull_back(self, gradient: Tensor) -> Tensor:
        whole = self._outcomes.student_gradient(gradient, self._student, self._job.temperature)
        self._job.student.pull_back_(whole, self._student)
        return whole

    def give_back(self) -> None:
        scratch.give_back(*self._logits)
