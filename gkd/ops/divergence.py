"""The divergence of logits as an op with a closed-form backward.

Legend: N rows (tokens), V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives.divergence import Divergence, score_rows, working_dtype
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows, row_factors
from gkd.ops.common import times, valid_columns


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
    student_valid_vocab: int | None = None,
    teacher_valid_vocab: int | None = None,
    scale_by_temperature_squared: bool = False,
    normalize_jsd: bool = False,
) -> Tensor:
    """A divergence between teacher and student over the whole vocabulary, from logits [..., V].

    kind, beta, alpha, temperature and the two convention flags: see `gkd.objectives.Divergence` (beta weights the
    teacher; the formulas and their sources are in `gkd.objectives.closed_forms`).
    weights    [...]; a row of weight 0 is ignored: loss 0, gradient exactly 0, even if it holds NaN.
    reduction  "sum" of w d, "mean" = sum w d / sum w (0 where the weights sum to 0), or "none": w d, shape [...].
    student_valid_vocab, teacher_valid_vocab
               columns from there on are padding: they count as -inf and get gradient 0. The two sides may be padded to
               different V as long as as many columns are left.

    Returns float32 (float64 for float64 logits). Differentiable once, in student_logits only; the gradient is computed
    in the forward pass, in the dtype of student_logits, and holds one tensor of their size until the backward pass.
    Raises InputError for shapes or dtypes that do not fit, ConfigError (a kind of InputError) for an option's value.
    """
    spec = Divergence(kind, beta, alpha, temperature, scale_by_temperature_squared, normalize_jsd)
    check_reduction(reduction)
    _check_pair(student_logits, teacher_logits, student_valid_vocab, teacher_valid_vocab)
    check_weights(weights, student_logits.shape[:-1])
    if weights is not None:
        weights = weights.detach().to(student_logits.device)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    student = student_logits if needs_gradient else student_logits.detach()
    teacher = teacher_logits.detach()[..., :teacher_valid_vocab]
    return _Divergence.apply(student, teacher, weights, student_valid_vocab, spec, reduction)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    """Value and closed-form gradient in the forward; the backward multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weights: Tensor | None,
        valid_vocab: int | None,
        spec: Divergence,
        reduction: str,
    ) -> Tensor:
        student = student_logits[..., :valid_vocab].reshape(-1, teacher_logits.shape[-1])  # [N, V]
        teacher = teacher_logits.reshape(student.shape)
        flat_weights = None if weights is None else weights.reshape(-1)
        alive = None if flat_weights is None else flat_weights != 0
        gradient, columns = None, None
        if ctx.needs_input_grad[0]:
            # float16 would lose small entries that the upstream gradient, a loss scale, is there to save.
            dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
            gradient = torch.zeros(student_logits.shape, dtype=dtype, device=student.device)
            columns = gradient.reshape(-1, gradient.shape[-1])[:, :valid_vocab]  # [N, V]
        like = student.new_empty(student.shape[0], dtype=working_dtype(student, teacher))  # [N]
        factors = row_factors(like, flat_weights, reduction)
        with torch.autocast(student.device.type, enabled=False):
            scores = score_rows(student, teacher, spec, gradient=columns, gradient_scale=factors, alive=alive)
            loss = reduce_rows(scores.value, flat_weights, reduction)
        if gradient is not None:
            ctx.save_for_backward(gradient, None if weights is None else weights != 0)
        ctx.dtype = student_logits.dtype
        return loss.reshape(student_logits.shape[:-1]) if reduction == "none" else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, alive = ctx.saved_tensors  # [..., V], [...]
        if upstream.dim() and alive is not None:
            upstream = torch.where(alive, upstream, 0.0)
        return times(gradient, upstream, ctx.dtype), None, None, None, None, None


def _check_pair(student: Tensor, teacher: Tensor, student_valid: int | None, teacher_valid: int | None) -> None:
    working_dtype(student, teacher)
    if student.dim() == 0 or student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise InputError(f"student and teacher logits must be [..., V] with the same rows, not {shapes}")
    if student.device != teacher.device:
        raise InputError(f"student logits are on {student.device}, teacher logits on {teacher.device}")
    student_columns = valid_columns("student_valid_vocab", student_valid, student.shape[-1])
    teacher_columns = valid_columns("teacher_valid_vocab", teacher_valid, teacher.shape[-1])
    if student_columns != teacher_columns:
        raise InputError(
            f"student logits have {student_columns} valid columns and teacher logits {teacher_columns}; where one is "
            "padded, say so with student_valid_vocab or teacher_valid_vocab"
        )
