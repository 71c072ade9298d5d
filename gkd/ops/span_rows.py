"""Which rows of a micro-batch stand in which spans of a teacher with another tokenizer.

Legend: N rows (scored tokens of the student), n and m rows of a side, S longer spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.types import AlignedScores


@dataclass(frozen=True)
class SpanRows:
    """Which rows stand in which spans; all on the CPU, so that no device is waited for."""

    ones: Tensor  # rows of the student in spans of one token a side
    teacher_ones: Tensor  # the teacher's in the same spans
    longer: Tensor  # [n] rows of the student in other spans
    longer_spans: Tensor  # [n] which of these
    teacher_longer: Tensor  # [m]
    teacher_longer_spans: Tensor  # [m]
    lengths: Tensor  # [S] tokens of the student in each
    is_longer: Tensor  # [N] bool
    is_compared: Tensor  # [N] bool

    @classmethod
    def of(cls, scores: AlignedScores) -> SpanRows:
        student, teacher, count = scores.student_spans, scores.spans, scores.span_count
        lengths = torch.bincount(student[student >= 0], minlength=count)
        is_one = (lengths == 1) & (torch.bincount(teacher, minlength=count) == 1)  # [spans]
        number = (~is_one).cumsum(0) - 1  # of the longer ones among themselves
        is_compared = student >= 0
        of_one = torch.zeros_like(is_compared)
        of_one[is_compared] = is_one[student[is_compared]]
        longer, teacher_of_one = (is_compared & ~of_one).nonzero()[:, 0], is_one[teacher]
        teacher_longer = (~teacher_of_one).nonzero()[:, 0]
        return cls(
            of_one.nonzero()[:, 0],
            teacher_of_one.nonzero()[:, 0],
            longer,
            number[student[longer]],
            teacher_longer,
            number[teacher[teacher_longer]],
            lengths[~is_one],
            is_compared & ~of_one,
            is_compared,
        )
