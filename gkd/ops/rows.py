"""Scoring rows of logits: by the native kernel where there is one, else by the reference.

Legend: N rows (scored tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd.objectives import divergence as reference
from gkd.objectives.divergence import Divergence, RowScores, check_kl_weights, check_logits
from gkd.objectives.hard_label import HardLabels
from gkd.ops import native
from gkd.ops.common import mark_written


@dataclass(frozen=True)
class RowMemory:
    """What a forward pass can keep of each row, so that the backward pass need not find it again."""

    stats: Tensor  # [N, 5]
    sums: Tensor  # [N, 3]
    has_stats: bool = False  # known already, not to be filled
    has_sums: bool = False

    @classmethod
    def of(
        cls, student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, stats: Tensor | None = None
    ) -> RowMemory | None:
        """Memory for rows of logits [N, V], with `stats` if they are known; None where no kernel would use it."""
        if not native.supports(student_logits, teacher_logits, divergence=divergence):
            return None
        dtype, n_rows = check_logits(student_logits, teacher_logits), student_logits.shape[0]
        sums = student_logits.new_empty(n_rows, len(native.SUMS), dtype=dtype)
        known = stats is not None
        return cls(
            student_logits.new_empty(n_rows, len(native.STATS), dtype=dtype) if stats is None else stats, sums, known
        )

    def of_rows(self, rows: slice) -> RowMemory:
        """The same memory of some of the rows."""
        return replace(self, stats=self.stats[rows], sums=self.sums[rows])

    def of_another(self) -> RowMemory:
        """For another divergence of the same rows, at the same temperature, once a call has filled this one."""
        return replace(self, sums=torch.empty_like(self.sums), has_stats=True, has_sums=False)

    def filled(self, sums: bool) -> RowMemory:
        """As a call that was given this has left it; without the sums where a later call's are others."""
        return replace(self, has_stats=True, has_sums=sums)


@torch.no_grad()
def score_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    *,
    gradient: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    alive: Tensor | None = None,
    hard_labels: HardLabels | None = None,
    kl_weights: Tensor | None = None,
    byproducts: bool = False,
    memory: RowMemory | None = None,
) -> RowScores:
    """`gkd.objectives.score_rows`, natively where there is a kernel: the losses of rows of logits [N, V].

    `gradient` may have more columns than the logits, which get 0, and another floating dtype.
    `memory` is filled, or read where it says that it has something; the reference does not look at it.
    Raises InputError for logits whose shapes or dtypes do not fit. No host synchronisation.
    """
    dtype = check_logits(student_logits, teacher_logits)
    matrices = [student_logits, teacher_logits] if gradient is None else [student_logits, teacher_logits, gradient]
    if not native.supports(*matrices, divergence=divergence):
        columns = student_logits.shape[1]
        if gradient is not None:
            gradient[:, columns:].zero_()
            gradient = gradient[:, :columns]
        return reference.score_rows(
            student_logits,
            teacher_logits,
            divergence,
            gradient=gradient,
            gradient_scale=gradient_scale,
            alive=alive,
            hard_labels=hard_labels,
            kl_weights=kl_weights,
            byproducts=byproducts,
        )
    n_rows = student_logits.shape[0]
    check_kl_weights(kl_weights, divergence, n_rows)
    value = student_logits.new_empty(n_rows, dtype=dtype)
    if memory is None and byproducts:
        memory = RowMemory.of(student_logits, teacher_logits, divergence)
    measured = student_logits.new_empty(len(native.BYPRODUCTS), n_rows, dtype=dtype) if byproducts else None
    native.score_rows(
        student_logits,
        teacher_logits,
        divergence,
        alive=alive,
        row_scale=None if gradient_scale is None else gradient_scale.to(dtype).contiguous(),
        labels=None if hard_labels is None else hard_labels.labels.to(torch.int64).contiguous(),
        hard_weight=None if hard_labels is None else hard_labels.weight.to(dtype).contiguous(),
        kl_weights=None if kl_weights is None else kl_weights.to(dtype).contiguous(),
        given_stats=memory.stats if memory is not None and memory.has_stats else None,
        given_sums=memory.sums if memory is not None and memory.has_sums and not byproducts else None,
        stats=memory.stats if memory is not None and not memory.has_stats else None,
        sums=memory.sums if memory is not None and not memory.has_sums else None,
        value=value,
        gradient=gradient,
        byproducts=measured,
    )
    if gradient is not None:
        mark_written(gradient)
    if memory is None or measured is None:
        return RowScores(value, {})
    named = dict(zip(native.BYPRODUCTS, measured, strict=True))
    return RowScores(value, {"divergence": memory.sums[:, 0] * divergence.scale, **named})
