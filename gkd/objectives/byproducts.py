"""What can be read off two distributions while they are in the cache anyway: for monitoring, never for the loss.

Legend: n rows of a tile, V vocabulary. P teacher, Q student, both at the loss's temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from gkd.objectives.closed_forms import RowPair, safe_product

BYPRODUCTS = ("divergence", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")
"""divergence is that of the loss, its conventions' scale included, before hard labels; entropies are in nats;
top1_agreement is 1.0 where the student's most likely token is (one of) the teacher's, else 0.0."""


def row_byproducts(
    pair: RowPair, student_logits: Tensor, teacher_logits: Tensor, temperature: float, exact: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """BYPRODUCTS of rows [n, V] -> {name: [n]}; logits are raw, before the division by the temperature.

    `exact` holds those that the caller has computed already; it must hold "divergence". The KLs computed here are plain
    sums P d: good to about 1e-5 nat in float32, where the loss itself is good to 1e-6 of its value.
    """
    student_top, student_choice = student_logits.max(dim=-1, keepdim=True)
    teacher_top = teacher_logits.amax(dim=-1, keepdim=True)
    measured = dict(exact)
    if "forward_kl" not in measured:
        measured["forward_kl"] = safe_product(pair.teacher, pair.log_ratio).sum(dim=-1)
    if "reverse_kl" not in measured:
        measured["reverse_kl"] = -safe_product(pair.student, pair.log_ratio).sum(dim=-1)
    student_below, teacher_below = student_logits - student_top, teacher_logits - teacher_top  # [n, V]
    measured["student_entropy"] = _entropy(pair.student, pair.student_log_top, student_below, temperature)
    measured["teacher_entropy"] = _entropy(pair.teacher, pair.teacher_log_top, teacher_below, temperature)
    agreement = teacher_logits.gather(-1, student_choice) == teacher_top
    measured["top1_agreement"] = agreement.squeeze(-1).to(pair.student.dtype)
    return {name: measured[name] + pair.poison.squeeze(-1) for name in BYPRODUCTS}


def _entropy(probabilities: Tensor, log_top: Tensor, below_top: Tensor, temperature: float) -> Tensor:
    """-sum p log p, [n], from log p = log_top + below_top / temperature. Overwrites below_top [n, V]."""
    finite = below_top.clamp_(min=torch.finfo(below_top.dtype).min)  # 0 * inf = 0
    vecdot = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.vecdot)  # pyright: ignore[reportUnknownMemberType]
    return -(log_top.squeeze(-1) + vecdot(probabilities, finite) / temperature)


def concatenate(parts: list[dict[str, Tensor]], like: Tensor, names: Sequence[str] = BYPRODUCTS) -> dict[str, Tensor]:
    """{name: [N]} of the tiles' {name: [n]}; empty tensors of `like`'s dtype and device where there was no tile."""
    if not parts:
        return {name: like.new_empty(0) for name in names}
    return {name: torch.cat([part[name] for part in parts]) for name in names}
