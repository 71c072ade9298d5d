"""The divergence from a teacher that gives only its top k, as an op with a closed-form backward.

Legend: N rows (tokens), V vocabulary, K slots of the teacher's support; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives import topk as reference
from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows, row_factors
from gkd.objectives.topk import TopkFunctions, check_mode, score_topk_rows
from gkd.ops import native
from gkd.ops.common import adjacent_columns, kept_dtype, mark_written, times, valid_columns
from gkd.ops.rows import score_rows


def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    kind: str = "forward_kl",
    *,
    mode: str = "tail",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
    student_valid_vocab: int | None = None,
    scale_by_temperature_squared: bool = False,
    normalize_jsd: bool = False,
) -> Tensor:
    """A divergence between a student's logits [..., V] and a teacher known by K tokens a row only.

    teacher_ids        [..., K] integer; a negative id is an empty slot, an id that stands twice counts the first time.
    teacher_log_probs  [..., K], the teacher's over its whole vocabulary AT `temperature`, which divides the student's
                       logits only; -inf is allowed. Not used where the slot is empty.
    mode               what becomes of the other tokens (formulas: `gkd.objectives.topk`):
        "tail"          one more outcome, on both sides. Exact for K = V; otherwise a lower bound.
        "renormalized"  nothing: both sides are renormalised over the K tokens, which alone get a gradient.
        "truncated"     nothing: sum_K P (log P - log Q) with P as it is; forward_kl only, and it can be negative.
    kind, beta, alpha, the two convention flags, weights and reduction: as in `gkd.divergence`.
    student_valid_vocab
                       columns from there on are padding: they count as -inf and get gradient 0.

    A row of weight 0 is ignored: loss 0, gradient exactly 0, whatever it holds, ids included. So is a row without ids,
    but it counts in the mean.
    In mode "tail" the teacher's tail is 1 - sum_K P, and the smallest that the dtype resolves where that is not above 0
    by the rounding of the log-probabilities. Give log-probabilities in float32 or float64: the roundings of a half
    precision would be a tail of 1e-3.

    Returns float32 (float64 for float64 student logits). Differentiable once, in student_logits only; the gradient is
    computed in the forward pass, in the dtype of student_logits, and holds one tensor of their size until the backward.
    Raises InputError for shapes or dtypes that do not fit and, on a CPU, for an id at or beyond the valid columns (on
    other devices, where looking would be a host synchronisation, that slot counts as empty); ConfigError (a kind of
    InputError) for an option's value, or a mode that does not offer the kind.
    """
    spec = Divergence(kind, beta, alpha, temperature, scale_by_temperature_squared, normalize_jsd)
    check_mode(mode, kind)
    check_reduction(reduction)
    columns = _check_inputs(student_logits, teacher_ids, teacher_log_probs, student_valid_vocab)
    check_weights(weights, student_logits.shape[:-1])
    if weights is not None:
        weights = weights.detach().to(student_logits.device)
    _check_ids(teacher_ids, columns, weights)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    student = student_logits if needs_gradient else student_logits.detach()
    teacher = (teacher_ids, teacher_log_probs.detach())
    return _TopkDivergence.apply(student, *teacher, weights, columns, spec, mode, reduction)  # type: ignore[no-any-return]


class _TopkDivergence(torch.autograd.Function):
    """Value and closed-form gradient in the forward; the backward multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        weights: Tensor | None,
        columns: int,
        spec: Divergence,
        mode: str,
        reduction: str,
    ) -> Tensor:
        rows, slots = student_logits.shape[:-1], teacher_ids.shape[-1]
        student = adjacent_columns(student_logits[..., :columns].reshape(rows.numel(), columns))  # [N, V]
        ids, log_probs = (tensor.reshape(rows.numel(), slots) for tensor in (teacher_ids, teacher_log_probs))  # [N, K]
        flat_weights = None if weights is None else weights.reshape(-1)
        alive = None if flat_weights is None else flat_weights != 0
        gradient, valid = None, None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty(student_logits.shape, dtype=kept_dtype(student), device=student.device)
            gradient[..., columns:].zero_()
            valid = gradient.view(rows.numel(), gradient.shape[-1])[:, :columns]  # [N, V]
        factors = row_factors(student.new_empty(rows.numel(), dtype=working_dtype(student)), flat_weights, reduction)
        with torch.autocast(student.device.type, enabled=False):
            value = score_topk_rows(  # [N]
                student, ids, log_probs, spec, mode,
                gradient=valid, gradient_scale=factors, alive=alive, functions=NATIVE,
            )  # fmt: skip
            loss = reduce_rows(value, flat_weights, reduction)
        if gradient is not None:
            ctx.save_for_backward(gradient, None if weights is None else weights != 0)
        ctx.dtype = student_logits.dtype
        return loss.reshape(rows) if reduction == "none" else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, alive = ctx.saved_tensors  # [..., V], [...]
        if upstream.dim() and alive is not None:
            upstream = torch.where(alive, upstream, 0.0)
        return times(gradient, upstream, ctx.dtype), *[None] * 7


@torch.no_grad()
def student_topk_log_probs(student_logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`gkd.objectives.topk.student_topk_log_probs`, natively where there is a kernel for it."""
    if not native.supports(student_logits):
        return reference.student_topk_log_probs(student_logits, ids, temperature)
    dtype = working_dtype(student_logits)
    on_k = student_logits.new_empty(ids.shape, dtype=dtype)  # [N, K]
    tail, logsumexp = student_logits.new_empty(2, ids.shape[0], dtype=dtype)  # [N]
    native.topk_log_probs(student_logits, ids.contiguous(), temperature, on_k=on_k, tail=tail, logsumexp=logsumexp)
    return on_k, tail, logsumexp


@torch.no_grad()
def write_topk_gradient(
    student_logits: Tensor,
    ids: Tensor,
    gradient_on_k: Tensor,
    off_k_factor: Tensor,
    logsumexp: Tensor,
    temperature: float,
    out: Tensor,
) -> None:
    """`gkd.objectives.topk.write_topk_gradient`, natively where there is a kernel for it."""
    factors = gradient_on_k, off_k_factor, logsumexp
    if not native.supports(student_logits, out):
        reference.write_topk_gradient(student_logits, ids, *factors, temperature, out)
        return
    on_k, off_k, logsumexp = (tensor.to(working_dtype(student_logits)).contiguous() for tensor in factors)
    inputs = {"on_k": on_k, "off_k": off_k, "logsumexp": logsumexp}
    native.topk_gradient(student_logits, ids.contiguous(), temperature, **inputs, gradient=out)
    mark_written(out)


NATIVE = TopkFunctions(student_topk_log_probs, write_topk_gradient, score_rows)


def _check_inputs(student: Tensor, ids: Tensor, log_probs: Tensor, valid_vocab: int | None) -> int:
    """The number of valid columns."""
    working_dtype(student, log_probs)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"teacher_ids must be integers, not {ids.dtype}")
    if ids.dim() == 0 or ids.shape != log_probs.shape:
        shapes = f"{list(ids.shape)} and {list(log_probs.shape)}"
        raise InputError(f"teacher_ids and teacher_log_probs must have the same shape [..., K], not {shapes}")
    if student.dim() == 0 or student.shape[:-1] != ids.shape[:-1]:
        shapes = f"{list(student.shape)} and {list(ids.shape)}"
        raise InputError(f"student_logits [..., V] and teacher_ids [..., K] must have the same rows, not {shapes}")
    if not student.device == ids.device == log_probs.device:
        devices = f"{student.device}, {ids.device} and {log_probs.device}"
        raise InputError(f"student_logits, teacher_ids and teacher_log_probs are on {devices}")
    return valid_columns("student_valid_vocab", valid_vocab, student.shape[-1])


def _check_ids(ids: Tensor, columns: int, weights: Tensor | None) -> None:
    if ids.device.type != "cpu":
        return
    outside = ids.to(torch.int64) >= columns  # in a narrow dtype the number of columns would wrap around
    if weights is not None:
        outside &= (weights != 0).unsqueeze(-1)
    if bool(outside.any()):
        raise InputError(f"teacher_ids holds {int(ids[outside][0])}, but the student has {columns} valid columns")
