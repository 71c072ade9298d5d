"""All terms of an objective over the vocabulary, from hidden states and heads: one pass, one gradient.

Legend: N rows (scored tokens), M of them that some loss acts on, K losses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from gkd.chunks import loss_chunk_bytes
from gkd.objectives.outcomes import Outcomes
from gkd.objectives.reduction import weigh
from gkd.ops.common import times, valid_columns
from gkd.ops.heads import Head, common_columns
from gkd.ops.pass_job import Group, PassJob, WeightedLoss
from gkd.ops.vocabulary_pass import run_pass
from gkd.types import HiddenScores, OutputHead, TeacherScores, TopkScores


@dataclass(frozen=True)
class TermScores:
    """The loss, differentiable, and what it is made of, detached; 0 where a loss does not act."""

    loss: Tensor  # scalar: sum over losses and rows of weight x value
    values: Tensor  # [K, N] before weights
    weights: Tensor  # [K, N]
    measures: dict[str, Tensor]  # by-products [N]; of the teacher's only where `compared`
    acts: Tensor  # [N] bool, on the CPU: some loss acts here, and `label_logprob` is known
    compared: Tensor  # [N] bool, on the CPU: the teacher's distribution was looked at


def linear_terms(
    student_hidden: Tensor,
    student_head: OutputHead,
    teacher: TeacherScores,
    losses: Sequence[WeightedLoss],
    *,
    acts: Tensor,
    labels: Tensor | None,
    valid_vocab: int,
    outcomes: Outcomes | None = None,
    temperature: float = 1.0,
    reference: HiddenScores | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> TermScores:
    """Sum over losses and rows of weight x value, from hidden states [N, H] and what the teacher says of the rows.

    acts [K, N] bool, on the CPU: which losses act on which rows; the others are not computed there, and a row without
    any costs nothing. labels [N] int64, -1 for none; None: no loss looks at them, and `label_logprob` is not measured.
    `outcomes`: what is compared where the heads' columns are of two vocabularies. Columns from `valid_vocab` on are
    padding, on both sides; of a top k, ids from there on are empty slots. `temperature` is that of the divergences
    among the losses. `reference` is what the initial student says of the rows, for losses that compare with it.
    compute_dtype, chunk_bytes: as in `gkd.linear_divergence`.

    Differentiable once, in student_hidden and the head's weight and bias; gradients are computed in the forward pass.
    Raises InputError for shapes that do not fit.
    """
    head = student_head
    if not torch.is_grad_enabled():  # autograd asks the tensors alone, and the head's gradient would be computed
        student_hidden, bias = student_hidden.detach(), None if head.bias is None else head.bias.detach()
        head = replace(head, weight=head.weight.detach(), bias=bias)
    n_rows, device = student_hidden.shape[0], student_hidden.device
    order, groups = _group_rows(acts, losses)
    chosen = None if order is None else order.to(device)
    student = Head.of("student", _rows(student_hidden, chosen), head)
    side = _teacher_side(teacher, chosen)
    job = PassJob(
        student,
        side,
        _columns(student, side, valid_vocab, outcomes),
        temperature,
        tuple(loss if loss.weights is None else replace(loss, weights=_rows(loss.weights, chosen)) for loss in losses),
        groups,
        None if labels is None else _rows(labels, chosen),
        True,
        compute_dtype,
        loss_chunk_bytes(device.type) if chunk_bytes is None else chunk_bytes,
        reference=_reference_side(reference, chosen),
        outcomes=outcomes,
    )
    apply = cast("Callable[..., Sequence[Tensor]]", _LinearTerms.apply)  # pyright: ignore[reportUnknownMemberType]
    loss, values, weights, *measured = apply(student.hidden, head.weight, head.bias, job)
    if chosen is not None:
        values, weights, *measured = (_back_in_place(out, chosen, n_rows) for out in (values, weights, *measured))
    needs = torch.tensor([loss.needs_teacher and side is not None for loss in losses], dtype=torch.bool)
    return TermScores(
        loss,
        values,
        weights,
        dict(zip(job.measure_names, measured, strict=True)),
        acts=acts.any(0),
        compared=(acts & needs[:, None]).any(0),
    )


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Those rows in that order; None is all as they are."""
    return values if chosen is None else values.index_select(0, chosen)


def _teacher_side(teacher: TeacherScores, chosen: Tensor | None) -> Head | TopkScores | None:
    if isinstance(teacher, HiddenScores):
        return Head.of("teacher", _rows(teacher.states, chosen), teacher.head).detached()
    if isinstance(teacher, TopkScores):
        return TopkScores(_rows(teacher.ids, chosen), _rows(teacher.log_probs, chosen))
    return None


def _reference_side(reference: HiddenScores | None, chosen: Tensor | None) -> Head | None:
    if reference is None:
        return None
    return Head.of("reference", _rows(reference.states, chosen), reference.head).detached()


def _columns(student: Head, teacher: Head | TopkScores | None, valid_vocab: int, outcomes: Outcomes | None) -> int:
    """How many are compared. Raises InputError for sides that do not fit."""
    if isinstance(teacher, Head) and outcomes is not None:
        teacher.check()
        student.check()
        return outcomes.count
    if isinstance(teacher, Head):
        return common_columns(student, teacher, valid_vocab)
    student.check()
    return valid_columns("valid_vocab", valid_vocab, student.weight.shape[0])


def _group_rows(acts: Tensor, losses: Sequence[WeightedLoss]) -> tuple[Tensor | None, tuple[Group, ...]]:
    """The rows that a loss acts on, sorted by which losses do, those that look at the teacher first; and the groups.

    None for rows that are in order as they are. On the CPU, so that no device is waited for.
    """
    n_losses, n_rows = acts.shape
    signature = (acts.long() << torch.arange(n_losses)[:, None]).sum(0)  # [N]
    unique = cast("Tensor", signature.unique())  # pyright: ignore[reportUnknownMemberType]
    found = [int(bits) for bits in unique]
    named = {bits: tuple(i for i in range(n_losses) if bits >> i & 1) for bits in found if bits}
    if len(named) == 1 and found == list(named):
        return None, (Group(slice(0, n_rows), next(iter(named.values()))),)
    order: list[Tensor] = []
    groups: list[Group] = []
    start = 0
    for bits, numbers in sorted(named.items(), key=lambda item: not any(losses[i].needs_teacher for i in item[1])):
        rows = (signature == bits).nonzero()[:, 0]
        order.append(rows)
        groups.append(Group(slice(start, start + len(rows)), numbers))
        start += len(rows)
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64), tuple(groups)


def _back_in_place(chosen_rows: Tensor, chosen: Tensor, n_rows: int) -> Tensor:
    """[..., N] of [..., M]; 0 in the rows that were left out."""
    whole = chosen_rows.new_zeros(*chosen_rows.shape[:-1], n_rows)
    return whole.index_copy_(-1, chosen, chosen_rows)


class _LinearTerms(torch.autograd.Function):
    """One pass over the rows, in the forward: the upstream gradient of a scalar loss is a factor that can wait."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: PassJob) -> tuple[Tensor, ...]:
        result = run_pass(job, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*result.gradients)  # not the head: its storage may be a shard's, for this call only
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        measured = list(result.measures.values())
        ctx.mark_non_differentiable(result.values, result.weights, *measured)
        return (weigh(result.values, result.weights).sum(), result.values, result.weights, *measured)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [
            None if gradient is None else times(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)
