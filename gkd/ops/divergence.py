"""The divergence of logits as an op with a closed-form backward.

Legend: N rows (tokens), V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows, row_factors
from gkd.ops.common import adjacent_columns, kept_dtype, late_factors, times, valid_columns, working_memory
from gkd.ops.rows import RowMemory, score_rows

GRADIENT_MODES = ("auto", "fused", "in_place", "recompute")


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
    gradient_mode: str = "auto",
    student_logsumexp: Tensor | None = None,
    teacher_logsumexp: Tensor | None = None,
) -> Tensor:
    """A divergence between teacher and student over the whole vocabulary, from logits [..., V].

    kind, beta, alpha, temperature and the two convention flags: see `gkd.objectives.Divergence` (beta weights the
    teacher; the formulas and their sources are in `gkd.objectives.closed_forms`).
    weights    [...]; a row of weight 0 is ignored: loss 0, gradient exactly 0, even if it holds NaN.
    reduction  "sum" of w d, "mean" = sum w d / sum w (0 where the weights sum to 0), or "none": w d, shape [...].
    student_valid_vocab, teacher_valid_vocab
               columns from there on are padding: they count as -inf and get gradient 0. The two sides may be padded to
               different V as long as as many columns are left.
    gradient_mode  where the gradient waits for the backward pass:
               "fused"      computed with the value, in a tensor like student_logits (float32 for float16 logits)
               "in_place"   computed with the value, over student_logits, which are lost: no memory at all. The logits
                            must not be needed by another backward (that of a linear layer does not need them; with
                            any other autograd refuses to go back).
               "recompute"  computed in the backward pass from the logits again and 8 numbers a row
               "auto"       "fused"; "recompute" for reduction "none", whose upstream gradient differs by row
    student_logsumexp, teacher_logsumexp
               [...] logsumexp(logits / temperature) over the valid columns, if known: saves a pass. Give both or none.

    Returns float32 (float64 for float64 logits). Differentiable once, in student_logits only.
    On a GPU, where both sides are bfloat16 or both float16 and the gradient is computed with the value, a forward or
    reverse KL or a JSD is off by up to about 3e-7 nat; elsewhere values keep their relative accuracy down to 1e-7 nat.
    Raises InputError for shapes or dtypes that do not fit, ConfigError (a kind of InputError) for an option's value.
    """
    spec = Divergence(kind, beta, alpha, temperature, scale_by_temperature_squared, normalize_jsd)
    check_reduction(reduction)
    if gradient_mode not in GRADIENT_MODES:
        raise ConfigError(f"gradient_mode: unknown {gradient_mode!r}; known: {', '.join(GRADIENT_MODES)}")
    _check_pair(student_logits, teacher_logits, student_valid_vocab, teacher_valid_vocab)
    rows = student_logits.shape[:-1]
    check_weights(weights, rows)
    if weights is not None:
        weights = weights.detach().to(student_logits.device)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if gradient_mode == "auto":
        gradient_mode = "recompute" if reduction == "none" else "fused"
    if needs_gradient and gradient_mode == "in_place":
        _check_in_place(student_logits)
    student = student_logits if needs_gradient else student_logits.detach()
    teacher = teacher_logits.detach()[..., :teacher_valid_vocab]
    stats = _known_stats(student_logsumexp, teacher_logsumexp, student, teacher, temperature)
    options = _Options(spec, reduction, gradient_mode, student_valid_vocab)
    return _Divergence.apply(student, teacher, weights, stats, options)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Options:
    spec: Divergence
    reduction: str
    gradient_mode: str
    student_valid_vocab: int | None


class _Divergence(torch.autograd.Function):
    """Value, and the gradient with it or in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weights: Tensor | None,
        stats: Tensor | None,
        options: _Options,
    ) -> Tensor:
        spec, reduction = options.spec, options.reduction
        flat = student_logits.detach().reshape(-1, student_logits.shape[-1])  # [N, Vs]
        teacher = _rows(teacher_logits)  # [N, V]
        student = _rows(flat[:, : options.student_valid_vocab])
        flat_weights = None if weights is None else weights.reshape(-1)
        alive = None if flat_weights is None else flat_weights != 0
        needs_gradient, late = ctx.needs_input_grad[0], options.gradient_mode == "recompute"
        gradient, factors = None, None
        memory = RowMemory.of(student, teacher, spec, stats) if stats is not None or (needs_gradient and late) else None
        if needs_gradient and not late:
            gradient = flat if options.gradient_mode == "in_place" else _empty_rows(flat, kept_dtype(flat))
            like = student.new_empty(student.shape[0], dtype=working_dtype(student, teacher))  # [N]
            factors = row_factors(like, flat_weights, reduction)
        scores = score_rows(
            student, teacher, spec, gradient=gradient, gradient_scale=factors, alive=alive, memory=memory
        )
        if gradient is not None:
            ctx.save_for_backward(gradient.view(student_logits.shape), None if weights is None else weights != 0)
        elif needs_gradient:
            kept = (None, None) if memory is None else (memory.stats, memory.sums)
            ctx.save_for_backward(student_logits, teacher_logits, weights, *kept)
        value = scores.value
        ctx.options, ctx.dtype = options, student_logits.dtype
        loss = reduce_rows(value, flat_weights, reduction)
        return loss.reshape(student_logits.shape[:-1]) if reduction == "none" else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.options.gradient_mode == "recompute":
            return _late_gradient(upstream, ctx.options, *ctx.saved_tensors), None, None, None, None
        gradient, alive = ctx.saved_tensors  # [..., V], [...]
        if upstream.dim() and alive is not None:
            upstream = torch.where(alive, upstream, 0.0)
        return times(gradient, upstream, ctx.dtype), None, None, None, None


def _late_gradient(
    upstream: Tensor,
    options: _Options,
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    stats: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    """The gradient [..., V] from the logits and what the forward pass kept of each row."""
    flat = student_logits.reshape(-1, student_logits.shape[-1])
    teacher = _rows(teacher_logits)
    student = _rows(flat[:, : options.student_valid_vocab])
    flat_weights = None if weights is None else weights.reshape(-1)
    like = student.new_empty(student.shape[0], dtype=working_dtype(student, teacher))
    alive = None if flat_weights is None else flat_weights != 0
    gradient = _empty_rows(flat, flat.dtype)
    score_rows(
        student,
        teacher,
        options.spec,
        gradient=gradient,
        gradient_scale=late_factors(like, flat_weights, options.reduction, upstream),
        alive=alive,
        memory=None if stats is None or sums is None else RowMemory(stats, sums, has_stats=True, has_sums=True),
    )
    return gradient.view(student_logits.shape)


def _rows(logits: Tensor) -> Tensor:
    """[N, V] with adjacent columns, without a copy where that is possible."""
    return adjacent_columns(logits.reshape(-1, logits.shape[-1]))


def _empty_rows(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient for logits [N, V], with adjacent columns even where theirs are not."""
    return working_memory(flat.shape, dtype, flat.device)


def _known_stats(
    student_logsumexp: Tensor | None,
    teacher_logsumexp: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
) -> Tensor | None:
    """The statistics [N, 5] that two log-sum-exps stand for: a maximum of T logsumexp with a sum of 1."""
    if student_logsumexp is None and teacher_logsumexp is None:
        return None
    if student_logsumexp is None or teacher_logsumexp is None:
        raise InputError("student_logsumexp and teacher_logsumexp belong together: give both or neither")
    rows, dtype = student.shape[:-1], working_dtype(student, teacher)
    for name, tensor in (("student", student_logsumexp), ("teacher", teacher_logsumexp)):
        if tensor.shape != rows:
            raise InputError(
                f"{name}_logsumexp must have one entry a row, shape {list(rows)}, not {list(tensor.shape)}"
            )
    student_top, teacher_top = (
        tensor.detach().to(student.device, dtype).reshape(-1) * temperature
        for tensor in (student_logsumexp, teacher_logsumexp)
    )
    one = torch.ones_like(student_top)
    return torch.stack([student_top, one, teacher_top, one, torch.zeros_like(one)], dim=1)


def _check_in_place(student: Tensor) -> None:
    """The gradient can overwrite what is one block of memory and nobody's parameter."""
    if student.is_leaf or (student._base is not None and student._base.is_leaf):
        raise InputError("gradient_mode 'in_place' would overwrite a leaf tensor; give it the output of a layer")
    if not student.is_contiguous():
        raise InputError("gradient_mode 'in_place' needs contiguous student logits")


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
