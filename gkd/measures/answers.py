"""Answers to held-out prompts, for people to read: greedy, so that what differs is the model and not the draw.

Legend: n_i tokens of answer i, K alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from gkd.files import finite
from gkd.measures.answer_tokens import Alternative, Answer, AnswerToken, AnswerTokens
from gkd.measures.heldout import COMPARED, DIVERGENCES, MeasuresDivergence, Pack
from gkd.ops.span_rows import SpanRows
from gkd.ops.token_logprobs import token_logprobs, top_logprobs
from gkd.seeding import derive_seed
from gkd.teacher.base import Teacher
from gkd.types import (
    AlignedScores,
    Decode,
    HiddenScores,
    Prompt,
    PromptDraw,
    Rollout,
    SampleRequest,
    SamplingSettings,
    TeacherScores,
    TokenBatch,
    TopkScores,
)

ALTERNATIVES = 5  # of the teacher, at each token
_CONTEXT_TOKENS = 4  # that a token is decoded behind: some tokenizers drop the space before a first token

ByToken = dict[str, torch.Tensor]  # name -> [n_i]


def greedy_settings(settings: SamplingSettings) -> SamplingSettings:
    return replace(settings, temperature=0.0, top_p=1.0, top_k=0)


def sample_requests(prompts: Sequence[Prompt], seed: int, *, of_teacher: bool = False) -> list[SampleRequest]:
    """Of the student, or of the teacher as it reads the prompts."""
    return [
        SampleRequest(p.read_by_teacher if of_teacher else p.token_ids, derive_seed(seed, "shown", p.index))
        for p in prompts
    ]


def answer_rollouts(prompts: Sequence[Prompt], answers: Sequence[Rollout]) -> list[Rollout]:
    """A rank without answers takes part with empty ones: all ranks must run the same number of forwards."""
    return [*answers, *(Rollout(PromptDraw(prompt, 0), "student", ()) for prompt in prompts[len(answers) :])]


class AnswerScoring:
    """What the student's answers look like token by token, to student and teacher."""

    def __init__(
        self, *, teacher: Teacher, student: MeasuresDivergence, pack: Pack, decode: Decode, valid_vocab: int
    ) -> None:
        """`decode` keeps special tokens; `valid_vocab` are the columns that both models have."""
        self._teacher, self._student, self._pack = teacher, student, pack
        self._decode, self._valid_vocab = decode, valid_vocab

    @torch.no_grad()
    def measure(self, rollouts: Sequence[Rollout]) -> AnswerTokens:
        """Of the rollouts of this rank; collective."""
        scores = self._teacher.score(rollouts)
        micro_batches = self._pack(rollouts, scores)
        by_answer = _by_sequence(micro_batches, self._student.token_measures(micro_batches, COMPARED))
        answers = [
            Answer(
                prompt=rollout.draw.prompt.text,
                tokens=self._tokens(rollout, said, by_answer[rollout.sample_id]) if rollout.completion_ids else (),
            )
            for rollout, said in zip(rollouts, scores, strict=True)
        ]
        return AnswerTokens(answers=tuple(answers))

    def _tokens(self, rollout: Rollout, scores: TeacherScores, measured: ByToken) -> tuple[AnswerToken, ...]:
        """`scores` are of the n_i scored tokens, `measured` is the student's side. Of what was observed nothing is."""
        ids = rollout.scored_ids
        labels = torch.tensor(ids).clamp(max=self._valid_vocab - 1)  # [n_i]
        if isinstance(scores, AlignedScores):
            teacher = _aligned_view(scores)
        elif isinstance(scores, HiddenScores):
            teacher = _whole_view(scores, self._valid_vocab, labels.to(scores.states.device))
        else:
            assert isinstance(scores, TopkScores)
            teacher = _topk_view(scores, labels.to(scores.ids.device))
        unknown = torch.full((len(ids),), math.nan)  # a divergence over the vocabulary, from a teacher's top k
        columns = {name: measured.get(name, unknown).tolist() for name in DIVERGENCES}
        columns["student_probability"] = measured["label_logprob"].exp().tolist()
        columns["teacher_probability"] = teacher.probability.tolist()
        best = zip(teacher.best_ids.tolist(), teacher.best_probabilities.tolist(), strict=True)
        said = {place: (row, one) for row, (place, one) in enumerate(zip(rollout.scored_places, best, strict=True))}
        tokens: list[AnswerToken] = []
        for place, token_id in enumerate(rollout.completion_ids):
            before = rollout.completion_ids[max(0, place - _CONTEXT_TOKENS) : place]
            values, alternatives = dict.fromkeys(columns), ()
            if place in said:
                row, likely = said[place]
                values = {name: finite(column[row]) for name, column in columns.items()}
                alternatives = tuple(self._alternatives(before, *likely))
            if token_id >= self._valid_vocab:
                values |= {"student_probability": None, "teacher_probability": None}
            text = self._text(before, token_id)
            tokens.append(AnswerToken(id=token_id, text=text, alternatives=alternatives, **values))
        return tuple(tokens)

    def _alternatives(
        self, before: Sequence[int], ids: Sequence[int], probabilities: Sequence[float]
    ) -> Iterator[Alternative]:
        for token_id, probability in zip(ids, probabilities, strict=True):
            if math.isnan(probability):
                return  # a teacher whose states are no numbers finds nothing likely
            if token_id < 0:
                continue  # one of another tokenizer's, which the student has not
            yield Alternative(id=token_id, text=self._text(before, token_id), probability=probability)

    def _text(self, before: Sequence[int], token_id: int) -> str:
        """What the token adds to the text of those before it."""
        start, whole = self._decode(before), self._decode([*before, token_id])
        # where it completes a character, what stood before it changes
        return whole.removeprefix(start) if whole.startswith(start) else self._decode([token_id])


class _TeacherView(NamedTuple):
    """What is shown of a teacher; K alternatives, the most likely first."""

    probability: torch.Tensor  # [n_i] of the token; NaN: not known
    best_ids: torch.Tensor  # [n_i, K]
    best_probabilities: torch.Tensor  # [n_i, K]


def _whole_view(scores: HiddenScores, valid_vocab: int, labels: torch.Tensor) -> _TeacherView:
    head = scores.head.first(valid_vocab)
    best, best_ids = top_logprobs(scores.states, head, ALTERNATIVES)
    return _TeacherView(token_logprobs(scores.states, head, labels).exp(), best_ids, best.exp())


def _aligned_view(scores: AlignedScores) -> _TeacherView:
    """With another tokenizer: where a token stands beside one of the teacher's; what only the teacher has is -1."""
    spans, count = SpanRows.of(scores), len(scores)
    states = scores.states[spans.teacher_ones.to(scores.states.device)]
    labels = scores.labels[spans.teacher_ones].to(states.device)
    best, ids = top_logprobs(states, scores.head, ALTERNATIVES)
    to_student = torch.full((scores.head.weight.shape[0],), -1)
    for student_id, teacher_id in scores.alignment.shared:
        to_student[teacher_id] = student_id
    probability, best_probabilities = torch.full((count,), math.nan), torch.full((count, best.shape[1]), math.nan)
    best_ids = torch.full((count, best.shape[1]), -1)
    probability[spans.ones] = token_logprobs(states, scores.head, labels).exp().cpu().float()
    best_ids[spans.ones], best_probabilities[spans.ones] = to_student[ids.cpu()], best.exp().cpu().float()
    return _TeacherView(probability, best_ids, best_probabilities)


def _topk_view(scores: TopkScores, labels: torch.Tensor) -> _TeacherView:
    best, slots = scores.log_probs.topk(min(ALTERNATIVES, scores.ids.shape[1]), dim=-1)
    is_label = scores.ids == labels[:, None]  # [n_i, slots of the teacher]
    probability = torch.where(is_label, scores.log_probs.exp(), 0.0).sum(-1)
    probability = torch.where(is_label.any(-1), probability, math.nan)
    return _TeacherView(probability, scores.ids.gather(-1, slots), best.exp())


def _by_sequence(micro_batches: Sequence[TokenBatch], measured: Sequence[ByToken]) -> dict[str, ByToken]:
    """Values of each sequence by its sample's name."""
    found: dict[str, ByToken] = {}
    for batch, values in zip(micro_batches, measured, strict=True):
        for sequence, sample_id in enumerate(batch.sample_ids):
            own = (batch.sequence_index == sequence).nonzero()[:, 0]
            found[sample_id] = {name: tokens.cpu()[own] for name, tokens in values.items()}
    return found
