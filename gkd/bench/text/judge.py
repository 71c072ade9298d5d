"""What a student is worth beside its teacher, on prompts that nobody trained on.

Divergences are taken twice: on texts that the teacher wrote, the same for all, and on what the student itself samples.
Where a student drifts off on its own samples, and does not on the teacher's, it suffers from exposure bias.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from gkd.bench.text.prepare import JUDGE_SEED, Texts
from gkd.config import Config
from gkd.evaluate.rouge import rouge_l
from gkd.measures.answers import greedy_settings, sample_requests
from gkd.measures.heldout import HeldoutEvaluation, HeldoutFigures, MeasuresDivergence, Pack, heldout_requests
from gkd.measures.samples import repeated_ngrams
from gkd.ops.token_logprobs import token_logprobs
from gkd.rollout.base import Sampler
from gkd.teacher.base import Teacher
from gkd.train import parts
from gkd.train.parts import Models
from gkd.types import Completion, HiddenScores, Prompt, PromptDraw, Rollout, TeacherScores


class Judge:
    """Asks a sampler, and compares with a teacher."""

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        teacher_sampled: Texts,
        teacher_greedy: Texts,
        bucket_tokens: int,
        config: Config,
        models: Models,
        teacher: Teacher,
        pack: Pack,
    ) -> None:
        self._prompts, self._teacher, self._pack, self._bucket_tokens = prompts, teacher, pack, bucket_tokens
        self._settings = parts.sampling_settings(config, models)
        self._models = models
        self._teacher_texts = _Scored.of(self._rollouts("teacher", teacher_sampled), teacher)
        self._references, self._teacher_greedy = [models.readable(ids) for ids in teacher_greedy], teacher_greedy

    def look(self, sampler: Sampler | Any, student: MeasuresDivergence) -> dict[str, Any]:
        """Of the sampler's model, which is also `student`'s. Divergences and likelihoods are in nats a token."""
        sampled = sampler.generate(heldout_requests(self._prompts, JUDGE_SEED), self._settings)
        greedy = sampler.generate(sample_requests(self._prompts, JUDGE_SEED), greedy_settings(self._settings))
        own = _Scored.of(self._rollouts("student", [completion.token_ids for completion in sampled]), self._teacher)
        on_teacher, on_own = (self._divergences(texts, student) for texts in (self._teacher_texts, own))
        return {
            "on_teacher": _means(on_teacher),
            "on_own": _means(on_own),
            "teacher_nll": own.teacher_nll(),
            "positions": {"on_teacher": on_teacher.as_record(), "on_own": on_own.as_record()},
            **self._answers(greedy),
        }

    def teacher_figures(self) -> dict[str, float]:
        """The same of the teacher's own texts, where they have a meaning."""
        return {
            "teacher_nll": self._teacher_texts.teacher_nll(),
            "answer_tokens": statistics.fmean(map(len, self._teacher_greedy)),
            "repeated_4grams": statistics.fmean(map(repeated_ngrams, self._teacher_greedy)),
        }

    def _rollouts(self, source: str, completions: Sequence[Sequence[int]]) -> list[Rollout]:
        pairs = zip(self._prompts, completions, strict=True)
        return [Rollout(PromptDraw(prompt, 0), source, tuple(ids)) for prompt, ids in pairs]

    def _divergences(self, texts: _Scored, student: MeasuresDivergence) -> HeldoutFigures:
        return HeldoutEvaluation(
            texts.rollouts,
            teacher=texts,
            student=student,
            pack=self._pack,
            rank=0,
            world_size=1,
            bucket_tokens=self._bucket_tokens,
        ).measure()

    def _answers(self, greedy: Sequence[Completion]) -> dict[str, float]:
        """Of greedy answers: likeness to the teacher's, length, whether they end, and how much they repeat."""
        texts = [self._models.readable(completion.token_ids) for completion in greedy]
        return {
            "rouge_l": statistics.fmean(map(rouge_l, texts, self._references)),
            "answer_tokens": statistics.fmean(len(completion.token_ids) for completion in greedy),
            "ended": statistics.fmean(completion.finish_reason == "stop" for completion in greedy),
            "repeated_4grams": statistics.fmean(repeated_ngrams(completion.token_ids) for completion in greedy),
        }


class _Scored:
    """Texts that the teacher has read: a `Teacher` that is asked for these alone."""

    def __init__(self, rollouts: Sequence[Rollout], scores: Sequence[TeacherScores]) -> None:
        self.rollouts, self._scores = rollouts, scores

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], teacher: Teacher) -> _Scored:
        return cls(rollouts, teacher.score(rollouts))

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        assert list(rollouts) == list(self.rollouts)
        return list(self._scores)

    def teacher_nll(self) -> float:
        """Nats a token: minus the teacher's mean log-probability of these tokens."""
        surprisal = []
        for rollout, said in zip(self.rollouts, self._scores, strict=True):
            assert isinstance(said, HiddenScores)
            labels = torch.tensor(rollout.completion_ids, device=said.states.device)
            surprisal.append(-token_logprobs(said.states, said.head, labels))
        return torch.cat(surprisal).mean().item()


def _means(figures: HeldoutFigures) -> dict[str, float]:
    return {name.removeprefix("heldout/"): value for name, value in figures.means.items()}
