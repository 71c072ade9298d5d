"""MiniLLM's policy gradient is the gradient of the reverse KL between whole texts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd.config import make_config
from gkd.errors import ConfigError
from gkd.objectives.objective import Objective
from gkd.objectives.returns import clipped
from gkd.train.module import ObjectiveHead, ObjectiveSums
from gkd.types import HiddenScores, OutputHead, TokenBatch

VOCABULARY, LENGTH, WIDTH = 4, 3, 5
TEXTS = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
PREFIXES = [text for n in range(LENGTH) for text in itertools.product(range(VOCABULARY), repeat=n)]


def objective(**term: Any) -> Objective:
    config = make_config(
        {
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"train": "d.jsonl"},
            "objective": {"kind": "policy_gradient", "advantage": "teacher", **term},
        }
    ).objective
    return config.at(0, config.memory())


class Enumerated:
    """Student and teacher whose states are a table over prefixes, and all texts, by the student's chances."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.states, self.weight = drawn(len(PREFIXES), WIDTH), drawn(VOCABULARY, WIDTH)
        self.teacher_states, self.teacher_weight = drawn(len(PREFIXES), WIDTH), drawn(VOCABULARY, WIDTH)
        self.parameters = [self.states.requires_grad_(), self.weight.requires_grad_()]
        self.rows = torch.tensor([PREFIXES.index(text[:n]) for text in TEXTS for n in range(LENGTH)])  # [N]
        self.labels = torch.tensor(TEXTS).flatten()  # [N]

    def text_logprobs(self, states: Tensor, weight: Tensor) -> Tensor:
        """[number of texts]."""
        logprobs = (states @ weight.T).log_softmax(-1)[self.rows]
        return logprobs.gather(-1, self.labels[:, None])[:, 0].reshape(-1, LENGTH).sum(1)

    def reverse_kl(self) -> Tensor:
        """Between whole texts."""
        student = self.text_logprobs(self.states, self.weight)
        return (student.exp() * (student - self.text_logprobs(self.teacher_states, self.teacher_weight))).sum()

    def token_logprobs(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, [number of texts, LENGTH]."""
        sides = ((self.states, self.weight), (self.teacher_states, self.teacher_weight))
        rows = [(states @ weight.T).log_softmax(-1)[self.rows] for states, weight in sides]
        student, teacher = (row.gather(-1, self.labels[:, None]).reshape(-1, LENGTH) for row in rows)
        return student, teacher

    def step_divergences(self) -> Tensor:
        """The reverse KL at each token, [number of texts, LENGTH]."""
        student = (self.states @ self.weight.T).log_softmax(-1)[self.rows]
        teacher = (self.teacher_states @ self.teacher_weight.T).log_softmax(-1)[self.rows]
        return (student.exp() * (student - teacher)).sum(-1).reshape(-1, LENGTH)

    def expected_gradient(self, objective: Objective, teacher_share: float = 0.0) -> list[Tensor]:
        """Of the loss of a text that the student sampled, or the teacher with it, over all texts."""
        student, teacher = (side.detach().exp() for side in self.token_logprobs())
        chances = (teacher_share * teacher + (1.0 - teacher_share) * student).prod(1)
        count = len(self.labels)
        batch = TokenBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            score_index=torch.zeros(count, dtype=torch.int64),
            labels=self.labels,
            weights=chances.repeat_interleave(LENGTH),
            sampler_logprobs=torch.full((count,), math.nan),
            sequence_index=torch.arange(len(TEXTS)).repeat_interleave(LENGTH),
            teacher=HiddenScores(self.teacher_states[self.rows], OutputHead(self.teacher_weight)),
            sample_ids=("text",) * len(TEXTS),
            sources=("student",) * len(TEXTS),
            completion_lengths=(LENGTH,) * len(TEXTS),
            teacher_share=torch.full((count,), teacher_share) if teacher_share else None,
        )
        head = ObjectiveHead(OutputHead(self.weight), VOCABULARY, torch.float64)
        sums = head(self.states[self.rows], batch, objective)
        assert isinstance(sums, ObjectiveSums)
        return list(torch.autograd.grad(sums.loss, self.parameters))


@pytest.mark.parametrize("single_step", ["exact", "sampled"])
def test_the_expectation_is_the_gradient_of_the_reverse_kl_of_texts(single_step: str) -> None:
    texts = Enumerated()
    exact = torch.autograd.grad(texts.reverse_kl(), texts.parameters)
    found = texts.expected_gradient(objective(single_step=single_step, length_normalize=False))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        assert other.abs().max() > 0.1
    normalised = texts.expected_gradient(objective(single_step=single_step))
    assert (normalised[0] - exact[0]).abs().max() > 1e-2, "the published form is another gradient"


def test_mixed_texts_are_weighed_as_published() -> None:
    """Equation by equation: w_t (KL_t + the mean of the later costs x log Q_t), over texts drawn from the mixture."""
    texts, share = Enumerated(), 0.25
    student, teacher = texts.token_logprobs()
    mixed = share * teacher.exp() + (1 - share) * student.exp()
    cost = student - teacher
    later = torch.stack([(cost[:, 1] + cost[:, 2]) / 2, cost[:, 2], torch.zeros(len(TEXTS))], dim=1)
    weight = (student.exp() / mixed).detach()
    values = weight * (texts.step_divergences() + later.detach() * student)
    expected = torch.autograd.grad((mixed.prod(1).detach()[:, None] * values).sum(), texts.parameters)
    found = texts.expected_gradient(objective(), share)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert weight.min() < 0.5 and 1.1 < weight.max() < 1 / (1 - share)


def test_the_ratio_is_clipped_as_by_ppo() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -0.5, -0.5, -2.0, -2.0], dtype=torch.float64, requires_grad=True)
    cost, old = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64), torch.full((6,), -1.0, dtype=torch.float64)
    ratio = (logprobs - old).exp()
    surrogate = -torch.minimum(-cost * ratio, -cost * ratio.clamp(0.8, 1.2))
    expected = torch.autograd.grad(surrogate.sum(), logprobs)[0]
    found = clipped(cost, ratio.detach(), 0.2)
    torch.testing.assert_close(found, expected)
    assert (found != 0).tolist() == [True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"temperature": 2.0}}, r"objective\.temperature: must be 1, and stay so, for policy_gradient"),
        ({"objective": {"constant": 2.0}}, r"constant: has no meaning with advantage: teacher"),
        ({"objective": {"advantage": "constant", "clip_range": 0.2}}, r"clip_range: has no meaning with"),
        ({"objective": {"advantage": "reward", "single_step": "sampled"}}, r"single_step: has no meaning with"),
        ({"objective": {"normalize_std": False}}, r"normalize_std: has no meaning with advantage: teacher"),
        ({"objective": {"advantage": "reward"}}, r"advantage: reward goes by rewards, which nobody gives; set environ"),
        ({"objective": {"reward_from": 1.0}}, r"policy_gradient goes by rewards, which nobody gives; set environment"),
        ({"objective": {"reward_from": 1.0, "reward_below": 1.0}}, r"reward_below: 1 is not above reward_from = 1"),
        (
            {"objective": {"advantage": "reward"}, "environment": {"kind": "answer"}},
            r"advantage: reward compares a prompt's samples with one another, and there is one; set rollout\.samples",
        ),
        (
            {
                "objective": {"advantage": "reward", "on": ["student", "teacher"]},
                "environment": {"kind": "answer"},
                "rollout": {"samples_per_prompt": 2},
                "mixture": {"student": 0.5, "teacher": 0.5},
            },
            r"policy_gradient is for the student's own samples, not for teacher",
        ),
        ({"teacher": {"placement": "topk", "model": "t", "addresses": ["http://a"]}}, r"needs the teacher.s whole"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_beside(changes: dict[str, Any], message: str) -> None:
    config = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}, **changes}
    term = {"kind": "policy_gradient", "advantage": "teacher", **changes.get("objective", {})}
    with pytest.raises(ConfigError, match=message):
        make_config({**config, "objective": term})


def test_texts_that_nobody_judges_are_no_terms_by_reward() -> None:
    config = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"train": "d.jsonl"},
        "environment": {"kind": "answer"},
        "mixture": {"student": 0.5, "teacher": 0.5},
    }
    term = {"kind": "forward_kl", "reward_below": 1.0}
    make_config({**config, "objective": {**term, "on": ["student", "teacher"]}})
    with pytest.raises(
        ConfigError, match=r"objective\.on: forward_kl goes by rewards, and nobody judges the texts of te"
    ):
        make_config({**config, "objective": {**term, "on": ["teacher"]}})
