"""The forward and the reverse KL, shared out by where the two distributions differ (AKL, arXiv 2404.02657).

head    the fewest tokens that the teacher gives half of its mass, its most likely ones
g       sum |P - Q| over the head, and over all others (the tail)

The forward KL gets g_head / (g_head + g_tail), the reverse KL the rest; half each where the two agree. It sorts each
row, so it costs far more than the loss itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gkd.objectives.token_weights.base import RowWeight

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import RowMeasures
    from gkd.objectives.token_weights.base import Weighed


class Adaptive(RowWeight):
    needs_whole_teacher: ClassVar[bool] = True

    mass: float = Field(0.5, gt=0.0, lt=1.0, description="the teacher's mass in the head")

    def misfit(self, term: Weighed) -> str | None:
        if term.kind not in ("forward_kl", "reverse_kl"):
            return f"is for a forward_kl and a reverse_kl, not for {term.kind}"
        return None

    def of_rows(self, rows: RowMeasures) -> Tensor:
        student_logits, teacher_logits = rows.logits()
        student = (student_logits / rows.temperature).softmax(-1)  # [n, V]
        teacher, order = (teacher_logits / rows.temperature).softmax(-1).sort(-1, descending=True)
        gap = (teacher - student.gather(-1, order)).abs()  # [n, V], the teacher's most likely token first
        in_head = teacher.cumsum(-1) - teacher < self.mass
        head, total = (gap * in_head).sum(-1), gap.sum(-1)
        share = (head / total.clamp(min=1e-30)).where(total > 0, 0.5)
        return share if rows.kind == "forward_kl" else 1.0 - share
