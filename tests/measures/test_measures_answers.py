"""Answers token by token, and the held-out measure by position, against float64 computations over full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.data import pack
from gkd.measures.answer_tokens import AnswerToken, AnswerTokens
from gkd.measures.answers import ALTERNATIVES, AnswerScoring, answer_rollouts
from gkd.measures.heldout import HeldoutEvaluation, HeldoutFigures, completion_positions, heldout_rollouts
from gkd.models import load_causal_lm
from gkd.monitor import JsonlSink, read_metrics
from gkd.objectives.objective import Objective
from gkd.teacher.local import LocalTeacher
from gkd.train.module import StudentModule, token_measures
from gkd.types import (
    AlignedScores,
    Alignment,
    Completion,
    OutputHead,
    Prompt,
    PromptDraw,
    Rollout,
    TeacherScores,
    TokenBatch,
)

VALID_VOCAB = 250  # of 259 rows: the others stand for padding
PROMPTS = [Prompt(i, tuple(range(10, 14 + i)), f"prompt {i}") for i in range(3)]
ANSWERS = [tuple(b"\n  a "), tuple(range(60, 90)), (200, 255, 201)]  # 255 is beyond the shared vocabulary
PACK = partial(pack, micro_batch_size=2, pad_token_id=0, reduction="token_mean")
PACKED = partial(PACK, micro_batch_tokens=40)


class PlainStudent:
    """Measures with the training run's module, outside of DeepSpeed."""

    def __init__(self, folder: Path) -> None:
        self._module = StudentModule(load_causal_lm(str(folder), "float32"), VALID_VOCAB, torch.float32)

    @torch.no_grad()
    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        return token_measures(self._module, micro_batches, objective, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> LocalTeacher:
    model = load_causal_lm(str(tiny_teacher), "float32")
    return LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=2, pad_token_id=0)


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> PlainStudent:
    return PlainStudent(tiny_student)


@pytest.fixture(scope="module")
def scoring(teacher: LocalTeacher, student: PlainStudent, tiny_student: Path) -> AnswerScoring:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    return AnswerScoring(
        teacher=teacher,
        student=student,
        pack=PACK,
        decode=lambda ids: tokenizer.decode(list(ids)),
        valid_vocab=VALID_VOCAB,
    )


def answered(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Rollout]:
    """By the student."""
    return [Rollout(PromptDraw(p, 0), "student", tuple(ids)) for p, ids in zip(prompts, answers, strict=True)]


@torch.no_grad()
def log_probabilities(folder: Path, rollout: Rollout) -> torch.Tensor:
    """[n_i, VALID_VOCAB] in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    start = len(rollout.draw.prompt.token_ids) - 1
    return model(torch.tensor([rollout.token_ids])).logits[0, start:-1, :VALID_VOCAB].log_softmax(-1)


def divergences(teacher: torch.Tensor, student: torch.Tensor) -> dict[str, torch.Tensor]:
    """[n_i] each, of log-probabilities [n_i, V]."""
    mixed = torch.logaddexp(teacher, student) - math.log(2)
    return {
        "forward_kl": (teacher.exp() * (teacher - student)).sum(-1),
        "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
        "jsd": 0.5 * (teacher.exp() * (teacher - mixed) + student.exp() * (student - mixed)).sum(-1),
    }


def test_every_number_agrees_with_float64(scoring: AnswerScoring, tiny_teacher: Path, tiny_student: Path) -> None:
    rollouts = answered(PROMPTS, ANSWERS)
    found = scoring.measure(rollouts)
    assert [answer.prompt for answer in found.answers] == [prompt.text for prompt in PROMPTS]
    for rollout, answer in zip(rollouts, found.answers, strict=True):
        of_teacher, of_student = (log_probabilities(folder, rollout) for folder in (tiny_teacher, tiny_student))
        assert tuple(token.id for token in answer.tokens) == rollout.completion_ids
        for name, values in divergences(of_teacher, of_student).items():
            assert [getattr(token, name) for token in answer.tokens] == pytest.approx(values.tolist(), rel=1e-4), name
        for place, token in enumerate(answer.tokens):
            check_probabilities(token, of_teacher[place].exp(), of_student[place].exp())


def check_probabilities(token: AnswerToken, of_teacher: torch.Tensor, of_student: torch.Tensor) -> None:
    if token.id >= VALID_VOCAB:
        assert token.student_probability is None and token.teacher_probability is None
    else:
        assert token.student_probability == pytest.approx(float(of_student[token.id]), rel=1e-4)
        assert token.teacher_probability == pytest.approx(float(of_teacher[token.id]), rel=1e-4)
    best = of_teacher.topk(ALTERNATIVES)
    assert [other.id for other in token.alternatives] == best.indices.tolist()
    assert [other.probability for other in token.alternatives] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_what_goes_to_a_teachers_token_is_not_what_it_says(tiny_student: Path) -> None:
    """The student's 3 and 4 are projected to the teacher's 1, which spells something else."""
    alignment = Alignment("projection", (2, 3, 4), (0, 1, 1), ((2, 0),))
    one, head = torch.zeros(1, dtype=torch.int64), OutputHead(torch.eye(3))
    said = AlignedScores(torch.tensor([[1.0, 3.0, 2.0]]), head, one, one, one, alignment)

    class Says:
        def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
            return [said]

    student = PlainStudent(tiny_student)
    scoring = AnswerScoring(teacher=Says(), student=student, pack=PACK, decode=str, valid_vocab=VALID_VOCAB)
    (answer,) = scoring.measure(answered(PROMPTS[:1], [(2,)])).answers
    (token,) = answer.tokens
    expected = torch.tensor([1.0, 3.0, 2.0]).softmax(0)[0].item()
    assert [one.id for one in token.alternatives] == [2] and token.teacher_probability == pytest.approx(expected)


def test_texts_add_up_to_the_answer(scoring: AnswerScoring, tiny_student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    ids = tuple(tokenizer.encode("Two lines:\n  <b> & more", add_special_tokens=False))
    (answer,) = scoring.measure(answered(PROMPTS[:1], [ids])).answers
    assert "".join(token.text for token in answer.tokens) == "Two lines:\n  <b> & more"


def test_the_file_comes_back(scoring: AnswerScoring) -> None:
    found = scoring.measure(answered(PROMPTS, ANSWERS))
    assert AnswerTokens.model_validate_json(found.model_dump_json()) == found


def test_a_rank_without_answers_forwards_as_often(scoring: AnswerScoring) -> None:
    rollouts = answer_rollouts(PROMPTS, [])
    assert len(PACK(rollouts, scoring._teacher.score(rollouts))) == 2
    assert [answer.tokens for answer in scoring.measure(rollouts).answers] == [(), (), ()]


@pytest.mark.parametrize("packer", [PACK, PACKED])
def test_positions_are_counted_in_the_completion(packer: partial[list[TokenBatch]], teacher: LocalTeacher) -> None:
    rollouts = answered([*PROMPTS, PROMPTS[0]], [*ANSWERS, ()])
    for batch in packer(rollouts, teacher.score(rollouts)):
        at = completion_positions(batch)
        for sequence in range(len(batch.sample_ids)):
            own = at[batch.sequence_index == sequence]
            assert own.tolist() == list(range(len(own)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_means_by_position(
    teacher: LocalTeacher, student: PlainStudent, tiny_teacher: Path, tiny_student: Path, world_size: int
) -> None:
    rollouts = heldout_rollouts(PROMPTS, [Completion(tuple(range(20, 20 + n)), (), "length") for n in (3, 130, 70)])
    parts: list[torch.Tensor] = []
    figures: list[HeldoutFigures] = []

    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        parts.append(values)
        return torch.stack(parts).sum(0)

    for rank in range(world_size):
        evaluation = HeldoutEvaluation(
            rollouts, teacher=teacher, student=student, pack=PACK, rank=rank, world_size=world_size,
            sum_over_ranks=sum_over_ranks,
        )  # fmt: skip
        figures.append(evaluation.measure())
    found = figures[-1]  # has the sum of all ranks
    assert (found.bucket_tokens, len(found.tokens)) == (3, 44)
    assert found.tokens == [sum(len(range(3 * b, min(3 * b + 3, n))) for n in (3, 130, 70)) for b in range(44)]
    sums = torch.zeros(3, 44, dtype=torch.float64)
    for rollout in rollouts:
        values = divergences(log_probabilities(tiny_teacher, rollout), log_probabilities(tiny_student, rollout))
        for place in range(len(rollout.completion_ids)):
            sums[:, place // 3] += torch.stack([column[place] for column in values.values()])
    for name, total in zip(("forward_kl", "reverse_kl", "jsd"), sums, strict=True):
        assert found.by_position[name] == pytest.approx((total / torch.tensor(found.tokens)).tolist(), rel=1e-4)
        assert found.means[f"heldout/{name}"] == pytest.approx(float(total.sum()) / 203, rel=1e-4)
    assert found.as_record()["jsd"] == found.by_position["jsd"]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    figures = HeldoutFigures({"heldout/jsd": math.nan}, 1, [1, 1], {"jsd": [math.nan, math.inf]})
    sink = JsonlSink(tmp_path / "positions.jsonl")
    sink.log(0, figures.as_record())
    sink.close()
    assert read_metrics(sink.path) == [{"step": 0, "bucket_tokens": 1, "tokens": [1, 1], "jsd": [None, None]}]
