"""The divergence of two language-model heads from hidden states, without logits for more than a chunk of tokens.

Legend: N rows (scored tokens), n rows of a chunk, Hs and Ht hidden sizes, V vocabulary (common columns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from gkd.chunks import loss_chunk_bytes
from gkd.errors import ConfigError, InputError
from gkd.objectives.divergence import Divergence
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows, row_factors, weigh
from gkd.objectives.row_losses import LabelLoss
from gkd.ops.common import times
from gkd.ops.heads import Head, common_columns
from gkd.ops.pass_job import Group, PassJob, WeightedLoss
from gkd.ops.vocabulary_pass import run_pass
from gkd.types import OutputHead


class LinearOptions(TypedDict, total=False):
    """The keyword options of `linear_divergence`, for the type checker; defaults and meaning are there."""

    beta: float
    alpha: float
    temperature: float
    weights: Tensor | None
    reduction: str
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_softcap: float | None
    teacher_softcap: float | None
    student_logit_scale: float
    teacher_logit_scale: float
    valid_vocab: int | None
    labels: Tensor | None
    hard_label_weight: Tensor | float | None
    scale_by_temperature_squared: bool
    normalize_jsd: bool
    compute_dtype: torch.dtype | None
    chunk_bytes: int | None


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: str = ...,
    *,
    byproducts: Literal[False] = ...,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: str = ...,
    *,
    byproducts: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: str = "forward_kl",
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    labels: Tensor | None = None,
    hard_label_weight: Tensor | float | None = None,
    scale_by_temperature_squared: bool = False,
    normalize_jsd: bool = False,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    byproducts: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """A divergence between two models over the whole vocabulary, from hidden states [N, H] and heads [V, H].

    logits = softcap * tanh(((hidden head^T) + bias) * logit_scale / softcap), the order of transformers (Gemma 2's
    final_logit_softcapping, Cohere's logit_scale, 1 / Granite's logits_scaling); they are float32 whatever the inputs.
    student_hidden [N, Hs], student_head [Vs, Hs], student_bias [Vs]; teacher likewise with Ht and Vt.

    kind, beta, alpha, temperature and the two convention flags: see `gkd.objectives.Divergence` (beta weights the
    teacher; the formulas and their sources are in `gkd.objectives.closed_forms`).
    weights, reduction  as in `gkd.divergence`: [N], weight 0 = ignored even if its hidden states hold NaN.
    valid_vocab         columns from there on are padding, on both sides; needed where Vs and Vt differ.
    labels, hard_label_weight
                        [N] token ids and h in [0, 1], [N] or a number: (1 - h) divergence + h cross-entropy at
                        temperature 1 (`gkd.objectives.hard_label`). A negative label (-100) means h = 0.
                        Labels without a weight leave the loss alone; they are for the by-product.
    compute_dtype       round hidden states and heads to this dtype before the products, as autocast would; gradients
                        still come back unrounded in their inputs' dtypes. Default: the inputs as they are.
    chunk_bytes         memory for one side's logits, of which two live at a time; default 256 MiB, on CUDA 1 GiB. On a
                        CPU the next call takes it over (`gkd.ops.scratch`).
    byproducts          also return {name: [N]} of `gkd.objectives.BYPRODUCTS`, and with labels "label_logprob", the
                        student's log-probability of the label at temperature 1; detached; 0 in ignored rows.

    Returns the loss, float32 (float64 for float64 inputs), or (loss, byproducts). Differentiable once, in the student's
    hidden states, head and bias. For "sum" and "mean" the gradients are computed in the forward pass and the head is
    not kept for the backward pass; "none" keeps the inputs and computes them in the backward pass. An enclosing
    autocast changes nothing.
    Raises InputError for shapes or dtypes that do not fit, ConfigError (a kind of InputError) for an option's value.
    """
    spec = Divergence(kind, beta, alpha, temperature, scale_by_temperature_squared, normalize_jsd)
    check_reduction(reduction)
    if chunk_bytes is None:
        chunk_bytes = loss_chunk_bytes(student_hidden.device.type)
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes: {chunk_bytes} must be at least 1")
    student_side = OutputHead(student_head, student_bias, student_logit_scale, student_softcap)
    teacher_side = OutputHead(teacher_head, teacher_bias, teacher_logit_scale, teacher_softcap)
    student = Head.of("student", student_hidden, student_side)
    teacher = Head.of("teacher", teacher_hidden, teacher_side)
    columns = common_columns(student, teacher, valid_vocab)
    rows = student_hidden.shape[:1]
    check_weights(weights, rows)
    if weights is not None:
        weights = weights.detach().to(student_hidden.device)
    labels = _checked_labels(labels, weights, student_hidden, columns)
    hard = _hard_label_weights(labels, hard_label_weight)
    teacher = teacher.detached()
    if not torch.is_grad_enabled():
        student_hidden, student_head = student_hidden.detach(), student_head.detach()
        student_bias = None if student_bias is None else student_bias.detach()
    live = _live_rows(weights)
    if live is not None and weights is not None:
        student_hidden, weights = student_hidden.index_select(0, live), weights[live]
        teacher = replace(teacher, hidden=teacher.hidden[live])
        labels = None if labels is None else labels[live]
        hard = None if hard is None else hard[live]
    student = replace(student, hidden=student_hidden, weight=student_head, bias=student_bias)
    job = PassJob(
        student,
        teacher,
        columns,
        temperature,
        (WeightedLoss(spec),) if hard is None else (WeightedLoss(spec), WeightedLoss(LabelLoss())),
        (Group(slice(0, student_hidden.shape[0]), (0,) if hard is None else (0, 1)),),
        labels,
        byproducts,
        compute_dtype,
        chunk_bytes,
        ignored=None if student_hidden.device.type == "cpu" else weights,  # there they have been left out
    )
    apply = cast("Callable[..., Sequence[Tensor]]", _LinearDivergence.apply)  # pyright: ignore[reportUnknownMemberType]
    outputs = apply(student_hidden, student_head, student_bias, job, weights, hard, reduction)
    if live is not None:
        outputs = [out if out.dim() == 0 else out.new_zeros(rows).index_copy(0, live, out) for out in outputs]
    loss, *measured = outputs
    return (loss, dict(zip(_measured_names(job), measured, strict=True))) if byproducts else loss


def _measured_names(job: PassJob) -> tuple[str, ...]:
    return ("divergence", *job.measure_names) if job.measures else ()


def _live_rows(weights: Tensor | None) -> Tensor | None:
    """The numbers of the rows that are not ignored, or None for all: where looking does not make a host wait, the
    products are spared the others."""
    if weights is None or weights.device.type != "cpu":
        return None
    live = weights.nonzero().squeeze(1)
    return None if len(live) == len(weights) else live


class _LinearDivergence(torch.autograd.Function):
    """One pass over the rows: in the forward for a scalar loss, whose upstream gradient is a factor that can wait;
    in the backward for reduction "none", whose upstream gradient belongs inside."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: PassJob,
        weights: Tensor | None,
        hard: Tensor | None,
        reduction: str,
    ) -> tuple[Tensor, ...]:
        needs: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        late = reduction == "none"
        like = torch.empty(hidden.shape[0], dtype=job.dtype, device=hidden.device)  # [N]
        factors = row_factors(like, weights, reduction)
        result = run_pass(_with_factors(job, factors, hard), (False, False, False) if late else needs)
        ctx.late = late and any(needs)
        if ctx.late:
            ctx.save_for_backward(hidden, weight, bias)
            no_head = replace(job.student, hidden=like, weight=like, bias=None)
            ctx.job, ctx.weights, ctx.hard = replace(job, student=no_head, measures=False), weights, hard
        else:
            # Not the head: its storage may be a shard's, gathered for this call only.
            ctx.save_for_backward(*result.gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        value = result.values[0]
        alive = None if weights is None else weights != 0
        # detached: autograd must not take the loss of reduction "none" for its by-product
        measured = [weigh(rows.detach(), alive) for rows in (value, *result.measures.values())] if job.measures else []
        ctx.mark_non_differentiable(*measured)
        if hard is not None:
            hard = hard.to(value.dtype)
            value = weigh(value, 1.0 - hard) + weigh(result.values[1], hard)
        return (reduce_rows(value, weights, reduction), *measured)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.late:
            scaled = [
                None if gradient is None else times(gradient, upstream, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ]
            return (*scaled, *[None] * 4)
        hidden, weight, bias = ctx.saved_tensors
        job = replace(ctx.job, student=replace(ctx.job.student, hidden=hidden, weight=weight, bias=bias))
        job = _with_factors(job, weigh(upstream, ctx.weights), ctx.hard)
        gradients = run_pass(job, ctx.needs_input_grad[:3]).gradients
        cast = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*cast, *[None] * 4)


def _with_factors(job: PassJob, factors: Tensor | None, hard: Tensor | None) -> PassJob:
    """The job with what the rows' gradients are multiplied by: `factors` [N], shared out by the labels' share [N]."""
    if hard is None:
        return replace(job, losses=(replace(job.losses[0], weights=factors),))
    hard = hard.to(job.dtype)
    factors = torch.ones_like(hard) if factors is None else factors
    shares = (1.0 - hard, hard)
    return replace(
        job,
        losses=tuple(replace(loss, weights=factors * share) for loss, share in zip(job.losses, shares, strict=True)),
    )


def _checked_labels(labels: Tensor | None, weights: Tensor | None, hidden: Tensor, columns: int) -> Tensor | None:
    """int64 labels [N], -1 in ignored rows. Raises InputError where they do not fit."""
    if labels is None:
        return None
    if labels.is_floating_point() or labels.shape != hidden.shape[:1]:
        raise InputError(f"labels must be token ids, one a row, not {labels.dtype} {list(labels.shape)}")
    labels = labels.to(hidden.device, torch.int64)
    if weights is not None:
        labels = torch.where(weights != 0, labels, -1)
    if labels.device.type == "cpu" and bool((labels >= columns).any()):  # elsewhere looking would make the host wait
        raise InputError(f"labels: {int(labels.max())} is not below {columns}, the number of columns that are compared")
    return labels


def _hard_label_weights(labels: Tensor | None, weight: Tensor | float | None) -> Tensor | None:
    """What the labels weigh in the loss, [N], 0 where there is none; None without any. Raises InputError or ConfigError
    where it does not fit."""
    if weight is None:
        return None
    if labels is None:
        raise InputError("hard_label_weight needs labels")
    if not isinstance(weight, Tensor):
        if not 0.0 <= weight <= 1.0:
            nearest = 1.0 if weight > 1.0 else 0.0
            raise ConfigError(f"hard_label_weight: {weight} is outside [0, 1]; the nearest valid value is {nearest}")
        weight = torch.full(labels.shape, weight, device=labels.device)
    if weight.shape != labels.shape:
        raise InputError(f"hard_label_weight must be a number or [{labels.shape[0]}], not {list(weight.shape)}")
    return torch.where(labels >= 0, weight.detach().to(labels.device), 0.0)
