"""Scores of tokens against float64 computations with plain transformers, and the rows made of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gkd.evaluate import task
from gkd.evaluate.figures import Figure
from gkd.evaluate.token_scores import DIVERGENCES, NLL, ScoringSettings, TokenScores, student_scores, teacher_nll
from gkd.measures.heldout import heldout_rollouts
from gkd.models import load_causal_lm
from gkd.teacher.local import LocalTeacher
from gkd.types import AlignedScores, Alignment, Completion, HiddenScores, Prompt, Rollout, TeacherScores

LENGTHS = (3, 40, 1, 17, 9)  # of the completions, on purpose not in order
BOOTSTRAP = task.Bootstrap(resamples=200, seed=0)
SETTINGS = ScoringSettings(2, 0, 259, torch.float32, torch.device("cpu"), chunk_mib=1)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    generator = np.random.default_rng(0)
    prompts = [Prompt(i, tuple(generator.integers(3, 259, size=4 + i).tolist()), "") for i in range(len(LENGTHS))]
    texts = [Completion(tuple(generator.integers(3, 259, size=n).tolist()), (), "length") for n in LENGTHS]
    return heldout_rollouts(prompts, texts)


@pytest.fixture(scope="module")
def of_teacher(tiny_teacher: Path, rollouts: list[Rollout]) -> list[TeacherScores]:
    model = load_causal_lm(str(tiny_teacher), "float32")
    return LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=3, pad_token_id=0).score(rollouts)


@pytest.fixture(scope="module")
def of_student(tiny_student: Path, rollouts: list[Rollout], of_teacher: list[TeacherScores]) -> list[TokenScores]:
    return student_scores(load_causal_lm(str(tiny_student), "float32"), rollouts, of_teacher, SETTINGS)


@torch.no_grad()
def log_probabilities(folder: Path, rollout: Rollout) -> torch.Tensor:
    """[n_i, V] in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    start = len(rollout.draw.prompt.token_ids) - 1
    return model(torch.tensor([rollout.token_ids])).logits[0, start:-1].log_softmax(-1)


def test_every_token_agrees_with_float64(
    tiny_teacher: Path, tiny_student: Path, rollouts: list[Rollout], of_student: list[TokenScores]
) -> None:
    for rollout, scores in zip(rollouts, of_student, strict=True):
        teacher, student = (log_probabilities(folder, rollout) for folder in (tiny_teacher, tiny_student))
        mixed = torch.logaddexp(teacher, student) - math.log(2)
        expected = {
            "forward_kl": (teacher.exp() * (teacher - student)).sum(-1),
            "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
            "jsd": 0.5 * ((teacher.exp() * (teacher - mixed)) + (student.exp() * (student - mixed))).sum(-1),
            "top1_agreement": (teacher.argmax(-1) == student.argmax(-1)).double(),
            NLL: -student.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0],
        }
        assert scores.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(scores[name], values.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_perplexity_of_teacher_and_student(
    tiny_teacher: Path,
    tiny_student: Path,
    rollouts: list[Rollout],
    of_teacher: list[TeacherScores],
    of_student: list[TokenScores],
) -> None:
    scores = {"teacher": teacher_nll(rollouts, of_teacher, SETTINGS), "student_after": of_student}
    row = task.perplexity_row(scores, "", BOOTSTRAP)
    for column, folder in (("teacher", tiny_teacher), ("student_after", tiny_student)):
        total = 0.0
        for rollout in rollouts:
            labels = torch.tensor(rollout.completion_ids)[:, None]
            total -= float(log_probabilities(folder, rollout).gather(-1, labels).sum())
        cell = row.cells[column]
        assert isinstance(cell, Figure) and cell.low is not None and cell.high is not None
        assert cell.value == pytest.approx(math.exp(total / sum(LENGTHS)), rel=1e-5)
        assert cell.low < cell.value < cell.high


def test_a_student_that_is_the_teacher_diverges_by_nothing(
    tiny_teacher: Path, rollouts: list[Rollout], of_teacher: list[TeacherScores]
) -> None:
    scores = student_scores(load_causal_lm(str(tiny_teacher), "float32"), rollouts, of_teacher, SETTINGS)
    for row in task.divergence_rows({"student_after": scores}, "", BOOTSTRAP):
        cell = row.cells["student_after"]
        assert isinstance(cell, Figure)
        assert cell.value == pytest.approx(1.0 if row.name == "top1_agreement" else 0.0, abs=1e-6), row.name


def in_spans(scores: TeacherScores, spans: list[int], student_spans: list[int], labels: list[int]) -> AlignedScores:
    """As if the teacher had said of its own tokens what it said of the first of the student's."""
    assert isinstance(scores, HiddenScores)
    ids = tuple(range(259))
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (labels, spans, student_spans))
    return AlignedScores(scores.states[: len(spans)], scores.head, *numbers, Alignment("shared", ids, ids, ()))


def test_another_tokenizer_with_equal_tokens_has_the_same_scores(
    tiny_student: Path, rollouts: list[Rollout], of_teacher: list[TeacherScores], of_student: list[TokenScores]
) -> None:
    aligned = [
        in_spans(said, [*range(len(said))], [*range(len(said))], list(rollout.completion_ids))
        for said, rollout in zip(of_teacher, rollouts, strict=True)
    ]
    found = student_scores(load_causal_lm(str(tiny_student), "float32"), rollouts, aligned, SETTINGS)
    nll = zip(teacher_nll(rollouts, aligned, SETTINGS), teacher_nll(rollouts, of_teacher, SETTINGS), strict=True)
    for ours, theirs in [*zip(found, of_student, strict=True), *nll]:
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_a_teacher_says_of_a_span_is_shared_out_over_its_tokens(
    rollouts: list[Rollout], of_teacher: list[TeacherScores]
) -> None:
    said, labels = of_teacher[0], list(rollouts[0].completion_ids)
    (plain,) = teacher_nll(rollouts[:1], [said], SETTINGS)
    aligned = in_spans(said, [0, 0], [0, 0, -1], labels[:2])
    (found,) = teacher_nll(rollouts[:1], [aligned], SETTINGS)
    half = plain[NLL][:2].sum() / 2
    np.testing.assert_allclose(found[NLL], [half, half, 0.0], rtol=1e-6)


def test_buckets_add_up_to_the_whole(of_student: list[TokenScores]) -> None:
    rows = {row.name: row.cells["s"] for row in task.divergence_rows({"s": of_student}, "", BOOTSTRAP)}
    for profile in task.divergence_profiles({"s": of_student}, ""):
        assert profile.buckets == ((1, 8), (9, 16), (17, 32), (33, 40))
        assert profile.tokens == (3 + 8 + 1 + 8 + 8, 8 + 8 + 1, 16 + 1, 8) and sum(profile.tokens) == sum(LENGTHS)
        total = rows[profile.name.removesuffix("_by_position")]
        assert isinstance(total, Figure)
        assert np.average(profile.cells["s"], weights=profile.tokens) == pytest.approx(total.value, rel=1e-12)


def test_a_mean_is_over_tokens_and_its_interval_over_prompts(of_student: list[TokenScores]) -> None:
    (row,) = (row for row in task.divergence_rows({"s": of_student}, "", BOOTSTRAP) if row.name == "forward_kl")
    cell = row.cells["s"]
    assert isinstance(cell, Figure) and cell.low is not None and cell.high is not None
    assert cell.value == pytest.approx(np.concatenate([s["forward_kl"] for s in of_student]).mean(), rel=1e-12)
    assert cell.low < cell.value < cell.high
    assert set(DIVERGENCES) < of_student[0].keys()


def test_the_first_bucket_alone_where_completions_are_short() -> None:
    assert task.position_buckets(5) == ((1, 5),)
    assert task.position_buckets(9) == ((1, 8), (9, 9))
