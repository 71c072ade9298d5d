"""One pass over the vocabulary for all that a loss says of it: values, by-products and gradients of every row.

Legend: N rows (scored tokens), n rows of a chunk or segment, V vocabulary (columns that are compared), K losses.

A chunk's logits are made once and shared by all losses: two products with a head for the logits, two for the gradients,
however many losses there are. Rows are sorted into groups before: those of a group have the same losses. What a chunk
holds of a group is a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence
from gkd.objectives.measures import RowMeasures
from gkd.objectives.tiles import row_tiles
from gkd.ops import scratch
from gkd.ops.chunk_logits import chunk_logits
from gkd.ops.heads import HeadGradients
from gkd.ops.pass_job import LABEL_LOGPROB, Group, PassJob
from gkd.ops.row_calls import Call, DivergenceCall, Rows, Scored, TopkCall, Values, Wanted, Weights
from gkd.ops.rows import RowMemory
from gkd.types import TopkScores

_SHARED_BYTES = 2 << 20  # on a CPU, of the gradient that several calls for the same rows add up in
_SHARED_BYTES_ELSEWHERE = 128 << 20


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
        logits = chunk_logits(job, any(needs))
        gradients = HeadGradients(student, logits.student_product, job.student_columns, needs)
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
                gradients.add(chunk, logits.pull_back(gradient))
        logits.give_back()
    return PassResult(values, weights, measures, gradients.results())


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
