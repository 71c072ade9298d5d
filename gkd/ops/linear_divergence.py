"""The divergence of two language-model heads from hidden states, without logits for more than a chunk of tokens.

Legend: N rows (scored tokens), n rows of a chunk, Hs and Ht hidden sizes, V vocabulary (common columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from gkd.chunks import loss_chunk_bytes
from gkd.errors import ConfigError, InputError
from gkd.objectives.byproducts import BYPRODUCTS, concatenate
from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.hard_label import HardLabels
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows, row_factors, weigh
from gkd.ops import scratch
from gkd.ops.common import times
from gkd.ops.heads import Head, HeadGradients, common_columns
from gkd.ops.rows import RowMemory, score_rows

LABEL_LOGPROB = "label_logprob"  # a by-product


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
    student = Head("student", student_hidden, student_head, student_bias, student_softcap, student_logit_scale)
    teacher = Head("teacher", teacher_hidden, teacher_head, teacher_bias, teacher_softcap, teacher_logit_scale)
    columns = common_columns(student, teacher, valid_vocab)
    rows = student_hidden.shape[:1]
    check_weights(weights, rows)
    if weights is not None:
        weights = weights.detach().to(student_hidden.device)
    labels = _checked_labels(labels, weights, student_hidden, columns)
    hard_labels = _hard_labels(labels, hard_label_weight)
    teacher = teacher.detached()
    if not torch.is_grad_enabled():
        student_hidden, student_head = student_hidden.detach(), student_head.detach()
        student_bias = None if student_bias is None else student_bias.detach()
    live = _live_rows(weights)
    if live is not None and weights is not None:
        student_hidden, weights = student_hidden.index_select(0, live), weights[live]
        student = replace(student, hidden=student_hidden)
        teacher = replace(teacher, hidden=teacher.hidden[live])
        labels = None if labels is None else labels[live]
        hard_labels = None if hard_labels is None else HardLabels(hard_labels.labels[live], hard_labels.weight[live])
    measured_names = _measured_names(byproducts, labels)
    job = _Job(
        spec, student, teacher, columns, weights, reduction, labels, hard_labels, compute_dtype, chunk_bytes,
        measured_names,
    )  # fmt: skip
    outputs: Any = _LinearDivergence.apply(student_hidden, student_head, student_bias, job)
    if live is not None:
        outputs = [out if out.dim() == 0 else out.new_zeros(rows).index_copy(0, live, out) for out in outputs]
    loss, *measured = outputs
    return (loss, dict(zip(measured_names, measured, strict=True))) if byproducts else loss


def _measured_names(byproducts: bool, labels: Tensor | None) -> tuple[str, ...]:
    return () if not byproducts else BYPRODUCTS if labels is None else (*BYPRODUCTS, LABEL_LOGPROB)


def _live_rows(weights: Tensor | None) -> Tensor | None:
    """The numbers of the rows that are not ignored, or None for all: where looking does not make a host wait, the
    products are spared the others."""
    if weights is None or weights.device.type != "cpu":
        return None
    live = weights.nonzero().squeeze(1)
    return None if len(live) == len(weights) else live


@dataclass(frozen=True)
class _Job:
    """Everything that a pass over the rows needs."""

    spec: Divergence
    student: Head
    teacher: Head
    columns: int
    weights: Tensor | None  # [N]
    reduction: str
    labels: Tensor | None  # [N]
    hard_labels: HardLabels | None
    compute_dtype: torch.dtype | None
    chunk_bytes: int
    measured_names: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        if self.compute_dtype == torch.float64:
            return torch.float64
        heads = (self.student, self.teacher)
        return working_dtype(*(tensor for head in heads for tensor in (head.hidden, head.weight)))

    def chunks(self) -> Iterator[slice]:
        """As few chunks as chunk_bytes allows, of about equal size."""
        n_rows = self.student.hidden.shape[0]
        at_most = max(1, self.chunk_bytes // (self.columns * self.dtype.itemsize))
        n_chunks = -(-n_rows // at_most)
        for index in range(n_chunks):
            yield slice(index * n_rows // n_chunks, (index + 1) * n_rows // n_chunks)


class _LinearDivergence(torch.autograd.Function):
    """One pass over the rows: in the forward for a scalar loss, whose upstream gradient is a factor that can wait;
    in the backward for reduction "none", whose upstream gradient belongs inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        needs: tuple[bool, bool, bool] = ctx.needs_input_grad[:3]
        late = job.reduction == "none"
        like = torch.empty(hidden.shape[0], dtype=job.dtype, device=hidden.device)  # [N]
        factors = row_factors(like, job.weights, job.reduction)
        value, measured, gradients = _pass(job, factors, (False, False, False) if late else needs)
        if late and any(needs):
            ctx.save_for_backward(hidden, weight, bias)
            ctx.job = replace(job, student=replace(job.student, hidden=like, weight=like, bias=None), measured_names=())
        else:
            # Not the head: its storage may be a shard's, gathered for this call only.
            ctx.save_for_backward(*gradients)
            ctx.job = None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*measured)
        return (reduce_rows(value, job.weights, job.reduction), *measured)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.job is None:
            scaled = [
                None if gradient is None else times(gradient, upstream, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ]
            return (*scaled, None)
        hidden, weight, bias = ctx.saved_tensors
        job = replace(ctx.job, student=replace(ctx.job.student, hidden=hidden, weight=weight, bias=bias))
        gradients = _pass(job, weigh(upstream, job.weights), ctx.needs_input_grad[:3])[2]
        cast = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*cast, None)


@torch.no_grad()
def _pass(
    job: _Job, factors: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Values [N], by-products (a list of [N], empty unless asked for) and gradients of sum factor * value.

    factors [N], None for ones; needs: whether gradients for hidden, head and bias are wanted.
    """
    student, teacher, dtype = job.student, job.teacher, job.dtype
    n_rows, device = student.hidden.shape[0], student.hidden.device
    value = torch.empty(n_rows, dtype=dtype, device=device)
    measured: list[dict[str, Tensor]] = []
    asks_labels = LABEL_LOGPROB in job.measured_names
    with torch.autocast(device.type, enabled=False):
        masked = None if device.type == "cpu" else job.weights  # there the ignored rows have been left out
        student_product = student.product(job.columns, masked, job.compute_dtype, dtype)
        teacher_product = teacher.product(job.columns, masked, job.compute_dtype, dtype)
        gradients = HeadGradients(student, student_product, job.columns, needs)
        factors = gradients.row_factors(factors)
        buffers = _Buffers(job, student_product.gradient_dtype if any(needs) else None)
        for rows in job.chunks():
            student_logits, teacher_logits, gradient = buffers.of(rows)  # [n, V] each
            student.logits(student_product, rows, student_logits)
            teacher.logits(teacher_product, rows, teacher_logits)
            labelled = _LabelLogprobs(job, rows, student_logits, teacher_logits) if asks_labels else None
            scores = score_rows(
                student_logits,
                teacher_logits,
                job.spec,
                gradient=gradient,
                gradient_scale=None if factors is None else factors[rows],
                hard_labels=None if job.hard_labels is None else job.hard_labels.rows(rows),
                byproducts=bool(job.measured_names),
                memory=labelled.memory if labelled else None,
            )
            value[rows] = scores.value
            measured.append(scores.byproducts | ({LABEL_LOGPROB: labelled.result()} if labelled else {}))
            if gradient is not None:
                student.pull_back_(gradient, student_logits)
                gradients.add(rows, gradient)
        buffers.give_back()
    alive = None if job.weights is None else job.weights != 0
    byproducts = concatenate(measured, value, job.measured_names)
    return value, [weigh(rows, alive) for rows in byproducts.values()], gradients.results()


class _LabelLogprobs:
    """Log-probabilities of the labels of a chunk's rows, by one look at the logits where their sum is found anyway."""

    def __init__(self, job: _Job, rows: slice, student_logits: Tensor, teacher_logits: Tensor) -> None:
        assert job.labels is not None
        labels = job.labels[rows]
        # taken now: the gradient may overwrite the logits
        self._picked = student_logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]  # [n]
        self._has_label = labels >= 0
        # the loss's own sum is this one at temperature 1
        self.memory = RowMemory.of(student_logits, teacher_logits, job.spec) if job.spec.temperature == 1.0 else None
        self._log_sum = student_logits.logsumexp(-1) if self.memory is None else None

    def result(self) -> Tensor:
        """[n], 0 without a label; after the scores, which fill the memory."""
        log_sum = self._log_sum
        if log_sum is None:
            assert self.memory is not None
            log_sum = self.memory.stats[:, 0] + self.memory.stats[:, 1].log()
        return torch.where(self._has_label, self._picked - log_sum, 0.0)


class _Buffers:
    """The [n, V] matrices of a pass, made once. The gradient overwrites the student's logits where it can."""

    def __init__(self, job: _Job, gradient_dtype: torch.dtype | None) -> None:
        largest = max((rows.stop - rows.start for rows in job.chunks()), default=0)
        device = job.student.hidden.device
        self._logits = [scratch.take((largest, job.columns), job.dtype, device) for _ in range(2)]
        self._gradient: Tensor | None = None
        if gradient_dtype is None:
            return
        if job.student.softcap is None:  # a row's gradient lies where its logits were, be it in half of the memory
            self._gradient = self._logits[0].view(gradient_dtype)[:, : job.columns]
        else:  # the cap's derivative needs the logits afterwards
            self._gradient = torch.empty_like(self._logits[0])

    def of(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        n = rows.stop - rows.start
        return self._logits[0][:n], self._logits[1][:n], None if self._gradient is None else self._gradient[:n]

    def give_back(self) -> None:
        scratch.give_back(*self._logits)


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


def _hard_labels(labels: Tensor | None, weight: Tensor | float | None) -> HardLabels | None:
    """Labels [N] with their weight in the loss, or None. Raises InputError or ConfigError where it does not fit."""
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
    return HardLabels(labels, weight.detach().to(labels.device))
