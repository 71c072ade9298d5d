"""One pass over the vocabulary for all that a loss says of it: values, by-products and gradients of every row.

Legend: N rows (scored tokens), n rows of a chunk or segment, V vocabulary (columns that are compared), K losses.

A chunk's logits are made once and shared by all losses: two products with a head for the logits, two for the gradients,
however many losses there are. Rows are sorted into groups before: those of a group have the same losses. What a chunk
holds of a group is a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.measures import RowMeasures
from gkd.objectives.row_losses import ReferenceLoss, RowFunction, RowLoss
from gkd.objectives.tiles import row_tiles
from gkd.ops import scratch
from gkd.ops.heads import Head, HeadGradients
from gkd.ops.row_calls import (
    KL_MEASURES,
    Call,
    DivergenceCall,
    Rows,
    Scored,
    TopkCall,
    Values,
    Wanted,
    Weights,
    plan_calls,
)
from gkd.ops.rows import RowMemory
from gkd.types import TopkScores

LABEL_LOGPROB = "label_logprob"  # a by-product: log Q(label) at temperature 1, 0 without a label
TOPK_MEASURES = ("student_entropy", "top1_agreement", "topk_forward_kl", "topk_reverse_kl")
"""From a top k: the first two are of the student's whole distribution, the last two of K tokens and one bucket."""

_SHARED_BYTES = 2 << 20  # on a CPU, of the gradient that several calls for the same rows add up in
_SHARED_BYTES_ELSEWHERE = 128 << 20


@dataclass(frozen=True)
class WeightedLoss:
    """One loss of the rows, and what its gradient is multiplied by."""

    loss: RowLoss
    weights: Tensor | None = None  # [N]; None is 1
    row_weights: tuple[Callable[[RowMeasures], Tensor], ...] = ()  # each [n], of a segment's rows
    kind: str = ""  # for `row_weights`

    @property
    def needs_teacher(self) -> bool:
        if self.row_weights or isinstance(self.loss, Divergence):
            return True
        return isinstance(self.loss, RowFunction) and self.loss.needs_teacher


@dataclass(frozen=True)
class Group:
    """Consecutive rows that have the same losses, by number."""

    rows: slice
    losses: tuple[int, ...]


@dataclass(frozen=True)
class PassJob:
    """Everything that a pass needs. Groups with a teacher come first."""

    student: Head
    teacher: Head | TopkScores | None
    columns: int
    temperature: float
    losses: tuple[WeightedLoss, ...]
    groups: tuple[Group, ...]
    labels: Tensor | None  # [N]
    measures: bool
    compute_dtype: torch.dtype | None
    chunk_bytes: int
    ignored: Tensor | None = None  # [N] weights whose zeros must not be looked at
    reference: Head | None = None  # the initial student, for losses that compare with it

    @cached_property
    def dtype(self) -> torch.dtype:
        if self.compute_dtype == torch.float64:
            return torch.float64
        sides = [side for side in (self.student, self.teacher, self.reference) if isinstance(side, Head)]
        return working_dtype(*(tensor for head in sides for tensor in (head.hidden, head.weight)))

    @cached_property
    def measure_names(self) -> tuple[str, ...]:
        if not self.measures:
            return ()
        of_teacher = KL_MEASURES if isinstance(self.teacher, Head) else TOPK_MEASURES if self.teacher else ()
        return of_teacher if self.labels is None else (*of_teacher, LABEL_LOGPROB)

    @cached_property
    def teacher_rows(self) -> int:
        """How many rows, from the first on, are compared with the teacher."""
        return max((g.rows.stop for g in self.groups if any(self.losses[i].needs_teacher for i in g.losses)), default=0)

    @cached_property
    def reference_rows(self) -> list[slice]:
        """The rows that are compared with the initial student."""
        return [g.rows for g in self.groups if any(isinstance(self.losses[i].loss, ReferenceLoss) for i in g.losses)]

    @cached_property
    def calls(self) -> tuple[list[Call], ...]:
        """Of each group."""
        whole = isinstance(self.teacher, Head)
        return tuple(plan_calls({i: self.losses[i].loss for i in group.losses}, whole) for group in self.groups)

    def chunks(self) -> Iterator[slice]:
        """As few chunks as chunk_bytes allows, of about equal size."""
        n_rows = self.student.hidden.shape[0]
        at_most = max(1, self.chunk_bytes // (self.columns * self.dtype.itemsize))
        n_chunks = -(-n_rows // at_most)
        for index in range(n_chunks):
            yield slice(index * n_rows // n_chunks, (index + 1) * n_rows // n_chunks)


@dataclass(frozen=True)
class PassResult:
    """Values and weights [K, N], 0 where a loss does not act; by-products [N] by name; gradients of hidden states, head
    and bias for sum weight x value, where they were wanted."""

    values: Tensor
    weights: Tensor
    measures: dict[str, Tensor]
    gradients: list[Tensor | None]


@torch.no_grad()
def run_pass(job: PassJob, needs: tuple[bool, bool, bool]) -> PassResult:
    """`needs`: whether gradients for hidden states, head and bias are wanted. No host synchronisation."""
    student, n_rows, device = job.student, job.student.hidden.shape[0], job.student.hidden.device
    values = torch.zeros(len(job.losses), n_rows, dtype=job.dtype, device=device)
    weights = torch.zeros_like(values)
    measures = {name: torch.zeros(n_rows, dtype=job.dtype, device=device) for name in job.measure_names}
    with torch.autocast(device.type, enabled=False):
        logits = _Logits(job, any(needs))
        gradients = HeadGradients(student, logits.student_product, job.columns, needs)
        for chunk in job.chunks():
            whole, gradient = logits.of(chunk)
            for group, calls in zip(job.groups, job.calls, strict=True):
                segment = slice(max(chunk.start, group.rows.start), min(chunk.stop, group.rows.stop))
                if segment.start >= segment.stop:
                    continue
                here = slice(segment.start - chunk.start, segment.stop - chunk.start)
                own_gradient = None if gradient is None else gradient[here]
                scored = _Segment(job, group, calls, segment, whole[here]).score(own_gradient)
                for number in group.losses:
                    values[number, segment], weights[number, segment] = scored.values[number], scored.weights[number]
                for name, found in scored.measures.items():
                    measures[name][segment] = found
            if gradient is not None:
                student.pull_back_(gradient, whole.student)
                gradients.add(chunk, gradient)
        logits.give_back()
    return PassResult(values, weights, measures, gradients.results())


class _Logits:
    """The [n, V] matrices of a pass, made once. A gradient overwrites the student's logits where it can."""

    def __init__(self, job: PassJob, with_gradient: bool) -> None:
        self._job = job
        teacher = job.teacher if isinstance(job.teacher, Head) else None
        self.student_product = job.student.product(job.columns, job.ignored, job.compute_dtype, job.dtype)
        self._teacher_product = (
            teacher.product(job.columns, job.ignored, job.compute_dtype, job.dtype) if teacher else None
        )
        self._alive = None if job.ignored is None else job.ignored != 0
        largest, device = max((rows.stop - rows.start for rows in job.chunks()), default=0), job.student.hidden.device
        self._reference_product = (
            job.reference.product(job.columns, job.ignored, job.compute_dtype, job.dtype) if job.reference else None
        )
        sides = 1 + (teacher is not None) + (job.reference is not None)
        self._logits = [scratch.take((largest, job.columns), job.dtype, device) for _ in range(sides)]
        self._gradient: Tensor | None = None
        if not with_gradient:
            return
        if job.student.softcap is None:  # a row's gradient lies where its logits were, be it in half of the memory
            dtype = self.student_product.gradient_dtype
            self._gradient = self._logits[0].view(dtype)[:, : job.columns]
        else:  # the cap's derivative needs the logits afterwards
            self._gradient = torch.empty_like(self._logits[0])

    def of(self, chunk: slice) -> tuple[Rows, Tensor | None]:
        job, n = self._job, chunk.stop - chunk.start
        student = job.student.logits(self.student_product, chunk, self._logits[0][:n])
        teacher: Tensor | TopkScores | None = None
        if isinstance(job.teacher, TopkScores):
            teacher = TopkScores(job.teacher.ids[chunk], job.teacher.log_probs[chunk])
        elif job.teacher is not None and self._teacher_product is not None:
            teacher = self._logits[1][:n]
            compared = slice(chunk.start, min(chunk.stop, max(chunk.start, job.teacher_rows)))
            if compared.stop > compared.start:
                job.teacher.logits(self._teacher_product, compared, teacher[: compared.stop - compared.start])
        labels, alive = (None if of_row is None else of_row[chunk] for of_row in (job.labels, self._alive))
        rows = Rows(student, teacher, labels, alive, self._reference(chunk))
        return rows, None if self._gradient is None else self._gradient[:n]

    def _reference(self, chunk: slice) -> Tensor | None:
        """Only the rows that are compared with it are filled."""
        job = self._job
        if job.reference is None or self._reference_product is None:
            return None
        logits = self._logits[-1][: chunk.stop - chunk.start]
        for rows in job.reference_rows:
            compared = slice(max(chunk.start, rows.start), min(chunk.stop, rows.stop))
            if compared.stop > compared.start:
                here = slice(compared.start - chunk.start, compared.stop - chunk.start)
                job.reference.logits(self._reference_product, compared, logits[here])
        return logits

    def give_back(self) -> None:
        scratch.give_back(*self._logits)


@dataclass(frozen=True)
class _SegmentScores:
    values: Values
    weights: Mapping[int, Tensor | float]
    measures: Mapping[str, Tensor]


class _Segment:
    """Rows of one group and one chunk."""

    def __init__(self, job: PassJob, group: Group, calls: Sequence[Call], segment: slice, rows: Rows) -> None:
        self._job, self._calls, self._rows = job, calls, rows
        self._losses = {number: job.losses[number] for number in group.losses}
        self._weights: dict[int, Tensor | None] = {
            number: None if loss.weights is None else loss.weights[segment] for number, loss in self._losses.items()
        }
        self._is_compared = any(loss.needs_teacher for loss in self._losses.values())

    def score(self, gradient: Tensor | None) -> _SegmentScores:
        """The gradient carries the logit scale, as every gradient below the logits does."""
        job, rows = self._job, self._rows
        memory = self._memory()
        at_one = memory if job.temperature == 1.0 else None  # labels are always looked at without a temperature
        labelled = _LabelLogprobs(rows, at_one) if self._looks_at_labels() else None
        found = dict(_student_measures(rows)) if job.measures and isinstance(rows.teacher, TopkScores) else {}
        look = _Look(job, self._calls, rows, memory) if self._needs_look() else None
        if look is not None:
            memory = look.memory
            self._apply_row_weights(look)
        factors = {number: _times(rows, weight, job.student.logit_scale) for number, weight in self._weights.items()}
        if look is None:
            wanted = "measures" if job.measures and self._is_compared else "values"
            scored = self._call(factors, gradient, wanted, memory)
        elif gradient is None:
            fused = {number for call in self._calls for number in _fused_labels(call)}
            scored = Scored({n: look.value(n) for n in self._losses if n not in fused}, look.first.measures)
        else:  # a gradient brings its value along, but where the look has it
            scored = _joined([look.first, self._call(factors, gradient, "gradient", memory)])
        values, found = dict(scored.values), found | dict(scored.measures)
        if labelled is not None:
            found[LABEL_LOGPROB] = labelled.result()
            values |= {number: -found[LABEL_LOGPROB] for call in self._calls for number in _fused_labels(call)}
        weights = {number: 1.0 if weight is None else weight for number, weight in self._weights.items()}
        return _SegmentScores(values, weights, {name: found[name] for name in job.measure_names if name in found})

    def _memory(self) -> RowMemory | None:
        """Of the first call, if it is a divergence's and somebody looks at it afterwards."""
        call, rows, job = self._calls[0], self._rows, self._job
        if not (isinstance(call, DivergenceCall) and isinstance(rows.teacher, Tensor)):
            return None
        if len(self._calls) > 1 or self._needs_look() or (self._looks_at_labels() and job.temperature == 1.0):
            return RowMemory.of(rows.student, rows.teacher, call.divergence)
        return None

    def _looks_at_labels(self) -> bool:
        measures = self._job.measures and self._rows.labels is not None
        return measures or any(_fused_labels(call) for call in self._calls)

    def _needs_look(self) -> bool:
        """Whether values and by-products have to be known before the gradient, or come from no call."""
        if any(loss.row_weights for loss in self._losses.values()):
            return True
        return self._job.measures and self._is_compared and not isinstance(self._calls[0], DivergenceCall | TopkCall)

    def _apply_row_weights(self, look: _Look) -> None:
        for number, loss in self._losses.items():
            for weigh_rows in loss.row_weights:
                weight, own = self._weights[number], weigh_rows(look.row_measures(number, loss.kind))
                self._weights[number] = own if weight is None else weight * own

    def _call(self, weights: Weights, gradient: Tensor | None, wanted: Wanted, memory: RowMemory | None) -> Scored:
        """`wanted` is of the first call; all others give their values."""
        rows, calls = self._rows, self._calls
        is_own_memory = gradient is None or calls[0].overwrites or gradient.dtype == rows.student.dtype
        if len(calls) == 1 and is_own_memory:
            return calls[0].score(rows, weights, gradient, wanted, memory)
        if gradient is None:
            ways = _ways(wanted, memory, len(calls))
            return _joined([call.score(rows, weights, None, *how) for call, how in zip(calls, ways, strict=True)])
        return self._call_by_tiles(weights, gradient, wanted, memory)

    def _call_by_tiles(self, weights: Weights, gradient: Tensor, wanted: Wanted, memory: RowMemory | None) -> Scored:
        """Adds up the calls' gradients for a few rows at a time: the logits are lost where theirs comes to lie."""
        (n_rows, columns), dtype, device = self._rows.student.shape, self._job.dtype, gradient.device
        most = _SHARED_BYTES if device.type == "cpu" else _SHARED_BYTES_ELSEWHERE
        tile_rows = min(n_rows, max(1, most // (columns * dtype.itemsize)))
        total, part = (scratch.take((tile_rows, columns), dtype, device) for _ in range(2))
        tiles: list[Scored] = []
        for start in range(0, n_rows, tile_rows):
            tile = slice(start, min(start + tile_rows, n_rows))
            rows, tile_memory = self._rows[tile], None if memory is None else memory.of_rows(tile)
            own = {number: None if weight is None else weight[tile] for number, weight in weights.items()}
            sums, found = total[: len(rows.student)], list[Scored]()
            ways = _ways(wanted, tile_memory, len(self._calls))
            for index, (call, how) in enumerate(zip(self._calls, ways, strict=True)):
                out = part[: len(rows.student)] if index else sums
                found.append(call.score(rows, own, out, *how))
                if index:
                    sums.add_(out)
            gradient[tile].copy_(sums)
            tiles.append(_joined(found))
        scratch.give_back(total, part)
        return Scored(_concatenated([tile.values for tile in tiles]), _concatenated([tile.measures for tile in tiles]))


def _ways(wanted: Wanted, memory: RowMemory | None, calls: int) -> list[tuple[Wanted, RowMemory | None]]:
    """What is asked of the first call, and of every other, which need not find the rows' statistics again."""
    others = [None if memory is None else memory.of_another() for _ in range(calls - 1)]
    return [(wanted, memory), *(("values", other) for other in others)]


def _fused_labels(call: Call) -> tuple[int, ...]:
    return call.label_losses if isinstance(call, DivergenceCall) else ()


def _times(rows: Rows, weight: Tensor | None, factor: float) -> Tensor | None:
    if factor == 1.0:
        return weight
    return (rows.student.new_ones(len(rows.student)) if weight is None else weight) * factor


def _joined(parts: Sequence[Scored]) -> Scored:
    """Of the same rows. By-products are those of the first call that has them."""
    values: Values = {}
    measures: dict[str, Tensor] = {}
    for part in parts:
        values |= part.values
        measures = {**part.measures, **measures}
    return Scored(values, measures)


def _concatenated(tiles: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}


class _Look:
    """By-products and values of a segment before anything is weighed, as far as they are asked for."""

    def __init__(self, job: PassJob, calls: Sequence[Call], rows: Rows, memory: RowMemory | None) -> None:
        self._job, self._rows = job, rows
        first = calls[0]
        if isinstance(rows.teacher, Tensor) and not isinstance(first, DivergenceCall):
            first = DivergenceCall(Divergence("forward_kl", temperature=job.temperature), ())
        self._calls = [call for call in calls if call is not first]
        self._unweighted: Weights = {number: None for group in job.groups for number in group.losses}
        self.first = first.score(rows, self._unweighted, None, "measures", memory)
        if isinstance(rows.teacher, TopkScores):
            self.first = Scored(self.first.values, {**self.first.measures, **_student_measures(rows)})
        self.memory = None if memory is None else memory.filled(sums=not getattr(first, "reverse_losses", ()))
        self._values: Values = dict(self.first.values)

    def value(self, number: int) -> Tensor:
        """Of one loss, [n]; scored when it is first asked for."""
        while number not in self._values:
            call = self._calls.pop(0)
            memory = None if self.memory is None else self.memory.of_another()
            self._values |= call.score(self._rows, self._unweighted, None, "values", memory).values
        return self._values[number]

    def row_measures(self, number: int, kind: str) -> RowMeasures:
        return RowMeasures(
            kind=kind,
            vocabulary=self._job.columns,
            temperature=self._job.temperature,
            measure=lambda name: self.first.measures[name],
            term_divergence=lambda: self.value(number),
            logits=self._logits,
        )

    def _logits(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self._rows.teacher, Tensor)
        return self._rows.student, self._rows.teacher


class _LabelLogprobs:
    """Log-probabilities of labels at temperature 1, by one look at the logits where their sum is found anyway."""

    def __init__(self, rows: Rows, memory: RowMemory | None) -> None:
        """`memory` is of temperature 1, or None."""
        assert rows.labels is not None
        # taken now: the gradient may overwrite the logits
        self._picked = rows.student.gather(1, rows.labels.clamp(min=0)[:, None])[:, 0]  # [n]
        self._has_label = rows.labels >= 0
        self._memory = memory
        self._log_sum = rows.student.logsumexp(-1) if memory is None else None

    def result(self) -> Tensor:
        """[n], 0 without a label; after the scores, which fill the memory."""
        log_sum = self._log_sum
        if log_sum is None:
            assert self._memory is not None
            log_sum = self._memory.stats[:, 0] + self._memory.stats[:, 1].log()
        return torch.where(self._has_label, self._picked - log_sum, 0.0)


def _student_measures(rows: Rows) -> dict[str, Tensor]:
    """Of the student's whole distribution beside a teacher's top k: its entropy, and whether the best tokens agree."""
    assert isinstance(rows.teacher, TopkScores)
    likeliest = rows.teacher.log_probs.argmax(-1, keepdim=True)  # [n, 1] of K
    best_ids = rows.teacher.ids.gather(-1, likeliest)[:, 0]
    logits = rows.student
    entropy, agreement = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    vecdot = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.vecdot)  # pyright: ignore[reportUnknownMemberType]
    for tile in row_tiles(len(logits), logits.shape[1] * logits.element_size(), logits.device):
        log_probs = logits[tile].log_softmax(-1)
        entropy[tile] = -vecdot(log_probs.exp(), log_probs)
        agreement[tile] = (log_probs.argmax(-1) == best_ids[tile]).to(logits.dtype)
    return {"student_entropy": entropy, "top1_agreement": agreement}
