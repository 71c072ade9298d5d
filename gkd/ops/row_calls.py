"""The losses of a row, as few calls of the row kernels as they allow.

Legend: n rows of a segment, V vocabulary, K slots of a teacher's top k.

Losses of the same rows share calls like this:
    one divergence               one call, however many losses it is: their weights are added
    a forward and a reverse KL   one call with two coefficients a row
    cross-entropy beside either  in the same call, as its hard label
    anything else                a call of its own, whose gradient is added
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from gkd.objectives.byproducts import BYPRODUCTS
from gkd.objectives.divergence import Divergence, MixedKl
from gkd.objectives.hard_label import HardLabels
from gkd.objectives.reduction import weigh
from gkd.objectives.row_losses import LabelLoss, ReferenceLoss, RowFunction, RowLoss
from gkd.objectives.topk import score_topk_rows
from gkd.ops.rows import RowMemory, score_rows
from gkd.ops.topk_divergence import NATIVE
from gkd.types import TopkScores

KL_MEASURES = BYPRODUCTS[1:]  # by-products of a call against a whole distribution
Values: TypeAlias = dict[int, Tensor]  # of each loss by its number, [n], before any weight
Weights: TypeAlias = Mapping[int, Tensor | None]  # of each loss, [n]; None is 1
Wanted: TypeAlias = Literal["gradient", "values", "measures"]  # each with what stands before it


@dataclass(frozen=True)
class Rows:
    """Logits [n, V], the teacher's of the same rows or its top k, labels [n], -1 for none, and the initial student's
    logits, where they were asked for.

    Where alive [n] is False, logits that are compared are not read, and score 0.
    """

    student: Tensor
    teacher: Tensor | TopkScores | None
    labels: Tensor | None
    alive: Tensor | None = None
    reference: Tensor | None = None

    def __getitem__(self, rows: slice) -> Rows:
        teacher = self.teacher
        if isinstance(teacher, TopkScores):
            teacher = TopkScores(teacher.ids[rows], teacher.log_probs[rows])
        elif teacher is not None:
            teacher = teacher[rows]
        optional = (self.labels, self.alive, self.reference)
        return Rows(self.student[rows], teacher, *(None if of_row is None else of_row[rows] for of_row in optional))

    def against_reference(self) -> Rows:
        """The same with the initial student in the teacher's place."""
        return replace(self, teacher=self.reference, reference=None)


@dataclass(frozen=True)
class Scored:
    """What a call found: the values of its losses, and by-products [n] by name where it was asked for them."""

    values: Values
    measures: Mapping[str, Tensor]


class Call(Protocol):
    """Some of a row's losses, scored together."""

    @property
    def overwrites(self) -> bool:
        """Whether the gradient may lie in the logits' own memory, in another dtype."""
        ...

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        """`weights` multiply the gradient [n, V], which is overwritten, and not the values."""
        ...


@dataclass(frozen=True)
class DivergenceCall:
    """A divergence from a whole distribution, or the mix of both KLs; the labels of cross-entropies come with it."""

    divergence: Divergence
    losses: tuple[int, ...]  # of a mix: those that are the forward KL
    reverse_losses: tuple[int, ...] = ()  # of a mix
    label_losses: tuple[int, ...] = ()
    overwrites = True

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        assert isinstance(rows.teacher, Tensor)
        divergence, kl_weights = self.divergence, None
        scale = _sum_of(weights, self.losses, rows) if gradient is not None or self.reverse_losses else None
        if self.reverse_losses:
            reverse = _sum_of(weights, self.reverse_losses, rows)
            kl_weights, scale = torch.stack([_or_ones(scale, rows), _or_ones(reverse, rows)]), None
        hard_labels = None
        if self.label_losses and gradient is not None:
            scale, hard_labels = self._with_labels(rows, _or_ones(scale, rows), weights)
        is_mixed = hard_labels is not None or kl_weights is not None  # the row's value is no loss's own
        found = score_rows(
            rows.student,
            rows.teacher,
            divergence,
            gradient=gradient,
            gradient_scale=scale,
            alive=rows.alive,
            hard_labels=hard_labels,
            kl_weights=kl_weights,
            byproducts=wanted == "measures" or (wanted == "values" and is_mixed),
            memory=memory,
        )
        if wanted == "gradient":
            return Scored({}, {})
        if kl_weights is not None:
            forward, reverse = (found.byproducts[name] * divergence.scale for name in ("forward_kl", "reverse_kl"))
            values = dict.fromkeys(self.losses, forward) | dict.fromkeys(self.reverse_losses, reverse)
        else:
            values = dict.fromkeys(self.losses, found.byproducts.get("divergence", found.value))
        return Scored(values, {name: found.byproducts[name] for name in KL_MEASURES if wanted == "measures"})

    def _with_labels(self, rows: Rows, soft: Tensor, weights: Weights) -> tuple[Tensor, HardLabels]:
        """The row's scale and label share that give the divergence the weight `soft`, and the label that of its own."""
        assert rows.labels is not None
        hard = torch.where(rows.labels >= 0, _or_ones(_sum_of(weights, self.label_losses, rows), rows), 0.0)
        total = soft + hard
        return total, HardLabels(rows.labels, hard / torch.where(total == 0, 1.0, total))


@dataclass(frozen=True)
class ReferenceCall:
    """A divergence from the initial student."""

    call: DivergenceCall
    overwrites = False

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        values = "gradient" if wanted == "gradient" else "values"  # by-products are of the teacher
        return self.call.score(rows.against_reference(), weights, gradient, values, None)


@dataclass(frozen=True)
class TopkCall:
    """A divergence of K + 1 outcomes: the teacher's top k, and all other tokens as one."""

    divergence: Divergence
    losses: tuple[int, ...]
    overwrites = False

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        assert isinstance(rows.teacher, TopkScores)
        found: dict[str, Tensor] = {}

        def score_outcomes(*args: Tensor, **options: Tensor) -> object:
            scores = score_rows(*args, **options, byproducts=True)  # pyright: ignore
            found.update((f"topk_{name}", scores.byproducts[name]) for name in ("forward_kl", "reverse_kl"))
            return scores

        value = score_topk_rows(
            rows.student,
            rows.teacher.ids,
            rows.teacher.log_probs,
            self.divergence,
            gradient=gradient,
            gradient_scale=None if gradient is None else _sum_of(weights, self.losses, rows),
            functions=replace(NATIVE, score_rows=score_outcomes) if wanted == "measures" else NATIVE,
        )
        return Scored(dict.fromkeys(self.losses, value), found)


@dataclass(frozen=True)
class LabelCall:
    """-factor log Q(label) of each loss, without a teacher. A label is a top k of one token that has all the mass."""

    factors: Mapping[int, float]  # of each loss
    temperature: float = 1.0
    overwrites = False

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        assert rows.labels is not None
        scaled: list[Tensor] = [_or_ones(weights[loss], rows) * factor for loss, factor in self.factors.items()]
        labels = rows.labels[:, None]  # [n, 1]
        certain = torch.zeros(labels.shape, dtype=rows.student.dtype, device=labels.device)
        value = score_topk_rows(
            rows.student,
            labels,
            certain,
            Divergence("forward_kl", temperature=self.temperature),
            "truncated",
            gradient=gradient,
            gradient_scale=torch.stack(scaled).sum(0),
            functions=NATIVE,
        )
        return Scored({loss: value * factor for loss, factor in self.factors.items()}, {})


@dataclass(frozen=True)
class FunctionCall:
    """A loss in plain PyTorch, differentiated by autograd."""

    function: RowFunction
    loss: int
    overwrites = False

    def score(
        self, rows: Rows, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None
    ) -> Scored:
        teacher = rows.teacher if isinstance(rows.teacher, Tensor) else None
        labels = rows.labels if rows.labels is not None else torch.full(rows.student.shape[:1], -1)
        with torch.enable_grad():
            student = rows.student.detach().clone().requires_grad_(gradient is not None)
            value = self.function.value(student, teacher, labels)
            if gradient is not None:
                gradient.copy_(torch.autograd.grad(weigh(value, weights[self.loss]).sum(), student)[0])
        return Scored({self.loss: value.detach()}, {})


def plan_calls(losses: Mapping[int, RowLoss], whole_teacher: bool) -> list[Call]:
    """The calls that score `losses`, by number, of the same rows."""
    by_divergence = _numbers_by_divergence({n: loss for n, loss in losses.items() if isinstance(loss, Divergence)})
    by_reference = {n: loss.divergence for n, loss in losses.items() if isinstance(loss, ReferenceLoss)}
    labels = {number: loss for number, loss in losses.items() if isinstance(loss, LabelLoss)}
    calls: list[Call] = []
    if whole_teacher and by_divergence:
        fused = tuple(number for number, loss in labels.items() if loss == LabelLoss())
        calls += _whole_calls(by_divergence, fused)
        labels = {number: loss for number, loss in labels.items() if number not in fused}
    else:
        calls += [TopkCall(divergence, numbers) for divergence, numbers in by_divergence.items()]
    for temperature in dict.fromkeys(loss.temperature for loss in labels.values()):
        own = {number: loss.factor for number, loss in labels.items() if loss.temperature == temperature}
        calls.append(LabelCall(own, temperature))
    calls += [FunctionCall(loss, number) for number, loss in losses.items() if isinstance(loss, RowFunction)]
    references = _numbers_by_divergence(by_reference)
    return calls + [ReferenceCall(DivergenceCall(divergence, numbers)) for divergence, numbers in references.items()]


def _numbers_by_divergence(losses: Mapping[int, Divergence]) -> dict[Divergence, tuple[int, ...]]:
    found: dict[Divergence, tuple[int, ...]] = {}
    for number, divergence in losses.items():
        found[divergence] = (*found.get(divergence, ()), number)
    return found


def _whole_calls(by_divergence: Mapping[Divergence, tuple[int, ...]], labels: tuple[int, ...]) -> list[DivergenceCall]:
    calls = [DivergenceCall(divergence, numbers) for divergence, numbers in by_divergence.items()]
    forward, reverse = (_first_of(calls, kind) for kind in ("forward_kl", "reverse_kl"))
    if forward and reverse and forward.divergence.scale == reverse.divergence.scale:
        mix = MixedKl(
            temperature=forward.divergence.temperature,
            scale_by_temperature_squared=forward.divergence.scale_by_temperature_squared,
        )
        calls = [call for call in calls if call not in (forward, reverse)]
        calls.insert(0, DivergenceCall(mix, forward.losses, reverse.losses))
    calls[0] = replace(calls[0], label_losses=labels)
    return calls


def _first_of(calls: Sequence[DivergenceCall], kind: str) -> DivergenceCall | None:
    return next((call for call in calls if call.divergence.limit == kind), None)


def _sum_of(weights: Weights, losses: Sequence[int], rows: Rows) -> Tensor | None:
    """[n]; None for 1."""
    if len(losses) == 1:
        return weights[losses[0]]
    return torch.stack([_or_ones(weights[loss], rows) for loss in losses]).sum(0)


def _or_ones(weight: Tensor | None, rows: Rows) -> Tensor:
    return rows.student.new_ones(len(rows.student)) if weight is None else weight.to(rows.student.dtype)
