"""The held-out measure: every rank takes part in every forward, and every row counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gkd.data import pack
from gkd.measures.answers import greedy_settings, sample_requests
from gkd.measures.heldout import HeldoutEvaluation, heldout_requests, heldout_rollouts
from gkd.models import TokenBytes, TokenizerPair, load_causal_lm, load_tokenizer
from gkd.objectives.objective import Objective
from gkd.teacher.local import LocalTeacher
from gkd.teacher.views import OtherTokenizer, WithViews
from gkd.train.module import StudentModule, token_measures
from gkd.types import Completion, Prompt, SamplingSettings, TokenBatch

PROMPTS = [Prompt(i, (5 + i, 6, 7), f"p{i}") for i in range(5)]
COMPLETIONS = [Completion(tuple(range(20, 21 + 2 * i)), (), "length") for i in range(5)]
PACK = partial(pack, micro_batch_size=2, pad_token_id=0, reduction="token_mean")


@pytest.fixture
def teacher(tiny_teacher: Path) -> LocalTeacher:
    model = load_causal_lm(str(tiny_teacher), "float32")
    return LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0)


class Counter:
    """Stands where a student stands, and remembers what it was asked."""

    def __init__(self) -> None:
        self.micro_batches = 0
        self.tokens = 0

    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        self.micro_batches += len(micro_batches)
        self.tokens += sum(batch.scored_tokens for batch in micro_batches)
        names = ("jsd", "forward_kl", "reverse_kl")
        return [dict.fromkeys(names, torch.ones(batch.scored_tokens)) for batch in micro_batches]


class PlainStudent:
    """Measures with the training run's module, outside of DeepSpeed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._module = StudentModule(model, 259, torch.float32)

    @torch.no_grad()
    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        return token_measures(self._module, micro_batches, objective, torch.device("cpu"))


def test_ranks_share_the_rows_and_forward_as_often(teacher: LocalTeacher) -> None:
    rollouts = heldout_rollouts(PROMPTS, COMPLETIONS)
    students = [Counter(), Counter()]
    for rank, student in enumerate(students):
        HeldoutEvaluation(rollouts, teacher=teacher, student=student, pack=PACK, rank=rank, world_size=2).measure()
    assert [student.micro_batches for student in students] == [2, 2]
    assert sum(student.tokens for student in students) == sum(len(c.token_ids) for c in COMPLETIONS)


def test_figures_are_means_over_tokens_from_full_logits(teacher: LocalTeacher, tiny_student: Path) -> None:
    model = load_causal_lm(str(tiny_student), "float32")
    student = PlainStudent(model)
    rollouts = heldout_rollouts(PROMPTS, COMPLETIONS)
    measured = (
        HeldoutEvaluation(rollouts, teacher=teacher, student=student, pack=PACK, rank=0, world_size=1).measure().means
    )
    total, tokens = torch.zeros(3, dtype=torch.float64), 0
    for rollout in rollouts:
        ids, span = torch.tensor([rollout.token_ids]), slice(len(rollout.draw.prompt.token_ids) - 1, -1)
        with torch.no_grad():
            p = teacher._model(ids).logits[0, span].double().softmax(-1)
            q = model(ids).logits[0, span].double().softmax(-1)
        m = (p + q) / 2
        total += torch.stack(
            [
                (p * (p / q).log()).sum(),
                (q * (q / p).log()).sum(),
                0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum(),
            ]
        )
        tokens += p.shape[0]
    expected = dict(
        zip(("heldout/forward_kl", "heldout/reverse_kl", "heldout/jsd"), (total / tokens).tolist(), strict=True)
    )
    assert measured == pytest.approx(expected, rel=1e-4)


def test_tokens_that_another_tokenizer_has_nothing_for_are_not_counted(
    teacher: LocalTeacher, tiny_teacher: Path, tiny_student: Path
) -> None:
    """A teacher that reads two tokens of each completion has the figures of completions of two tokens."""
    side = TokenBytes(load_tokenizer(str(tiny_teacher)), "teacher.model")
    pair = TokenizerPair.of(side, side, (2,), (2,))
    cut = WithViews(teacher, {"main": OtherTokenizer(pair, pair.alignment, 2)})
    student = PlainStudent(load_causal_lm(str(tiny_student), "float32"))
    short = [replace(one, token_ids=one.token_ids[:2]) for one in COMPLETIONS]
    figures = [
        HeldoutEvaluation(
            heldout_rollouts(PROMPTS, written), teacher=who, student=student, pack=PACK, rank=0, world_size=1
        ).measure()
        for written, who in ((COMPLETIONS, cut), (short, teacher))
    ]
    aligned = {name.replace("aligned_", ""): mean for name, mean in figures[0].means.items()}
    assert aligned == pytest.approx(figures[1].means, rel=1e-4) and len(aligned) == 3


def test_requests_are_fixed_by_the_seed() -> None:
    assert heldout_requests(PROMPTS, 1) == heldout_requests(PROMPTS, 1) != heldout_requests(PROMPTS, 2)
    assert {r.seed for r in heldout_requests(PROMPTS, 1)}.isdisjoint(r.seed for r in sample_requests(PROMPTS, 1))


def test_answers_to_look_at_are_greedy() -> None:
    settings = greedy_settings(SamplingSettings(7, temperature=0.7, top_p=0.5, top_k=3, stop_token_ids=(2,)))
    assert settings == SamplingSettings(7, temperature=0.0, stop_token_ids=(2,))
