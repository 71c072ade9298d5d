"""All terms of an objective against a teacher with another tokenizer: on the spans that both cut a text into.

Legend: N rows (scored tokens of the student), M tokens of the teacher, K losses, S spans.

A span of one token a side is a row of the ordinary pass, over the outcomes that both vocabularies have
(`gkd.objectives.outcomes`). A longer one is two outcomes (`gkd.objectives.spans`): its gradient is that of the tokens'
log-probabilities, times a number that is known before the pass, so it is among the losses of labels. Its value is
shared out evenly over its tokens. What stands in no span is compared with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence
from gkd.objectives.outcomes import Outcomes, ProjectedOutcomes, RankedOutcomes, SharedOutcomes
from gkd.objectives.reduction import weigh
from gkd.objectives.row_losses import LabelLoss
from gkd.objectives.spans import SpanScores, score_spans
from gkd.ops.linear_terms import TermScores, linear_terms
from gkd.ops.pass_job import ALIGNED_MEASURES, LABEL_LOGPROB, WeightedLoss
from gkd.ops.span_rows import SpanRows
from gkd.ops.token_logprobs import token_logprobs
from gkd.types import AlignedScores, Alignment, HiddenScores, NoScores, OutputHead

_MEASURED = ("forward_kl", "reverse_kl", "top1_agreement")  # by-products that become ALIGNED_MEASURES


def aligned_terms(
    student_hidden: Tensor,
    student_head: OutputHead,
    teacher: AlignedScores,
    losses: Sequence[WeightedLoss],
    *,
    acts: Tensor,
    labels: Tensor,
    valid_vocab: int,
    temperature: float = 1.0,
    reference: HiddenScores | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> TermScores:
    """As `linear_terms`, whose arguments these are. Losses are divergences, and what needs no teacher; with ULD total
    variations are of ranks, and other divergences, which measure, of shared tokens.

    Head products: two for every row, one more a side for the rows of longer spans, and the student's once more for the
    labels of all rows.
    """
    spans, valid_head = SpanRows.of(teacher), student_head.first(valid_vocab)
    compared = [number for number, loss in enumerate(losses) if loss.needs_teacher]
    others = [number for number, loss in enumerate(losses) if not loss.needs_teacher]
    is_ranked = teacher.alignment.kind == "uld" and all(_is_total_variation(losses[number]) for number in compared)
    device, n_rows = student_hidden.device, len(student_hidden)
    ones = spans.ones.to(device)
    whole = linear_terms(  # spans of one token a side
        student_hidden.index_select(0, ones),
        student_head,
        HiddenScores(teacher.states.index_select(0, spans.teacher_ones.to(device)), teacher.head),
        [_of_rows(losses[number], ones) for number in compared],
        acts=acts[compared][:, spans.ones],
        labels=None,
        valid_vocab=valid_vocab,
        outcomes=_outcomes(teacher.alignment, is_ranked, valid_vocab, teacher.head.weight.shape[0], device),
        temperature=temperature,
        compute_dtype=compute_dtype,
        chunk_bytes=chunk_bytes,
    )
    logprobs = token_logprobs(student_hidden, valid_head, labels.clamp(min=0), compute_dtype, chunk_bytes=chunk_bytes)
    longer = _Longer.of(spans, student_hidden, valid_head, teacher, labels, temperature, compute_dtype)
    scored = [longer.score(losses[number], n_rows) for number in compared]
    rest = linear_terms(
        student_hidden,
        student_head,
        NoScores(n_rows),
        [*(losses[number] for number in others), *(one.as_labels for one in scored)],
        acts=torch.cat([acts[others], acts[compared] & spans.is_longer]),
        labels=labels,
        valid_vocab=valid_vocab,
        temperature=temperature,
        reference=reference,
        compute_dtype=compute_dtype,
        chunk_bytes=chunk_bytes,
    )
    found = _Found.of(rest, len(others), compared, others, acts)
    found.add_ones(whole, ones)
    for place, one in enumerate(scored):
        found.add_longer(compared[place], one, longer)
    # of ranks nothing is measured: the likeliest token is first on both sides
    measured = torch.zeros_like(spans.is_compared) if is_ranked else spans.is_compared
    return found.scores(torch.where(labels >= 0, logprobs, 0.0), measured)


@dataclass(frozen=True)
class _ScoredSpans:
    """One loss of the longer spans."""

    scores: SpanScores
    weights: Tensor  # [S]
    as_labels: WeightedLoss  # with the gradient of the loss, and another value


@dataclass(frozen=True)
class _Longer:
    """The longer spans of a micro-batch."""

    rows: Tensor  # [n] of the student
    spans: Tensor  # [n]
    lengths: Tensor  # [S]
    student_log_pi: Tensor  # [S]
    teacher_log_pi: Tensor  # [S]
    temperature: float

    @classmethod
    def of(
        cls,
        spans: SpanRows,
        student_hidden: Tensor,
        student_head: OutputHead,
        teacher: AlignedScores,
        labels: Tensor,
        temperature: float,
        compute_dtype: torch.dtype | None,
    ) -> _Longer:
        device = student_hidden.device

        def log_pi(hidden: Tensor, head: OutputHead, ids: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
            rows = rows.to(device)
            own = token_logprobs(
                hidden.index_select(0, rows), head, ids.to(device)[rows], compute_dtype, temperature=temperature
            )
            return own.new_zeros(len(spans.lengths)).index_add_(0, numbers.to(device), own)

        return cls(
            spans.longer.to(device),
            spans.longer_spans.to(device),
            spans.lengths.to(device),
            log_pi(student_hidden, student_head, labels.clamp(min=0), spans.longer, spans.longer_spans),
            log_pi(teacher.states, teacher.head, teacher.labels, spans.teacher_longer, spans.teacher_longer_spans),
            temperature,
        )

    def score(self, loss: WeightedLoss, n_rows: int) -> _ScoredSpans:
        """A span weighs what its tokens do on average."""
        assert isinstance(loss.loss, Divergence)
        scores = score_spans(self.student_log_pi, self.teacher_log_pi.to(self.student_log_pi.dtype), loss.loss)
        weights = torch.ones_like(scores.value)
        if loss.weights is not None:
            own = loss.weights[self.rows].to(weights.dtype)
            weights = torch.zeros_like(weights).index_add_(0, self.spans, own) / self.lengths
        of_rows = scores.value.new_zeros(n_rows)
        of_rows[self.rows] = -(scores.gradient * weights)[self.spans]  # a label's loss is -log Q
        return _ScoredSpans(scores, weights, WeightedLoss(LabelLoss(temperature=self.temperature), of_rows))

    def shared_out(self, of_spans: Tensor) -> Tensor:
        """[n]: what each token has of its span's [S]."""
        return (of_spans / self.lengths)[self.spans]


@dataclass
class _Found:
    """What is known of the rows so far, in their own order; [K, N] each, 0 where nothing acts."""

    loss: Tensor
    values: Tensor
    weights: Tensor
    measures: dict[str, Tensor]
    acts: Tensor
    compared: Sequence[int]

    @classmethod
    def of(cls, rest: TermScores, count: int, compared: Sequence[int], others: Sequence[int], acts: Tensor) -> _Found:
        """The first `count` losses of `rest` are the `others`, the rest of them only look like losses of labels."""
        values = rest.values.new_zeros(acts.shape)
        weights = torch.zeros_like(values)
        values[others], weights[others] = rest.values[:count], rest.weights[:count]
        stand_ins = weigh(rest.values[count:], rest.weights[count:]).sum()
        measures = {name: values.new_zeros(acts.shape[1]) for name in ALIGNED_MEASURES}
        return cls(rest.loss - stand_ins, values, weights, measures, acts, compared)

    def add_ones(self, whole: TermScores, rows: Tensor) -> None:
        self.loss = self.loss + whole.loss
        for place, number in enumerate(self.compared):
            self.values[number, rows], self.weights[number, rows] = whole.values[place], whole.weights[place]
        for name, source in zip(ALIGNED_MEASURES, _MEASURED, strict=True):
            self.measures[name][rows] = whole.measures[source]

    def add_longer(self, number: int, found: _ScoredSpans, longer: _Longer) -> None:
        is_active = self.acts[number].to(longer.rows.device)[longer.rows]
        values = torch.where(is_active, longer.shared_out(found.scores.value), 0.0)
        weights = torch.where(is_active, found.weights[longer.spans], 0.0)
        self.loss = self.loss + weigh(values, weights).sum()
        self.values[number, longer.rows], self.weights[number, longer.rows] = values, weights
        for name, source in zip(ALIGNED_MEASURES, _MEASURED, strict=True):
            measured = found.scores.byproducts[source]
            of_rows = measured[longer.spans] if source == "top1_agreement" else longer.shared_out(measured)
            self.measures[name][longer.rows] = torch.where(is_active, of_rows, self.measures[name][longer.rows])

    def scores(self, label_logprobs: Tensor, measured: Tensor) -> TermScores:
        """`measured` [N] bool: where by-products are known."""
        is_active = self.acts.any(0)
        measures = self.measures | {
            LABEL_LOGPROB: torch.where(is_active.to(label_logprobs.device), label_logprobs, 0.0)
        }
        return TermScores(
            self.loss,
            self.values,
            self.weights,
            measures,
            acts=is_active,
            compared=self.acts[list(self.compared)].any(0) & measured,
        )


def _of_rows(loss: WeightedLoss, rows: Tensor) -> WeightedLoss:
    return loss if loss.weights is None else replace(loss, weights=loss.weights.index_select(0, rows))


def _is_total_variation(loss: WeightedLoss) -> bool:
    return isinstance(loss.loss, Divergence) and loss.loss.limit == "tvd"


@lru_cache(maxsize=8)
def _outcomes(
    alignment: Alignment, is_ranked: bool, student_columns: int, teacher_columns: int, device: torch.device
) -> Outcomes:
    """Made once: which columns have a counterpart is the same for every micro-batch."""
    if is_ranked:
        return RankedOutcomes(student_columns, teacher_columns)
    kind = ProjectedOutcomes if alignment.kind == "projection" else SharedOutcomes
    return kind(alignment.student_ids, alignment.teacher_ids, student_columns, teacher_columns, device)
