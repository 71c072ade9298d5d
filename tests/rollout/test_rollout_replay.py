"""Earlier texts of the student, trained on again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gkd.config import MixtureConfig, ReplayConfig, RolloutConfig, make_config
from gkd.errors import ConfigError
from gkd.objectives.objective import divergence_objective
from gkd.rollout.mixture import MixtureRollouts
from gkd.train.module import ObjectiveHead, ObjectiveSums
from gkd.types import (
    Completion,
    HiddenScores,
    OutputHead,
    Prompt,
    PromptDraw,
    Rollout,
    SampleRequest,
    SamplingSettings,
    TokenBatch,
)

HALF = MixtureConfig.model_validate({"student": 0.5, "replay": 0.5})
DRAWS = [PromptDraw(Prompt(i, (i + 10, 5), ""), 0) for i in range(12)]


class EchoSampler:
    weights_version: int | None = None

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        return [Completion((r.seed % 251,), (-(r.seed % 7) / 3,), "length") for r in requests]

    def sleep(self) -> None: ...


class Trained:
    """Steps of a run, the student's weights one version further each time."""

    def __init__(self, **replay: int) -> None:
        self.sampler, self.steps = EchoSampler(), list[list[Rollout]]()
        self.rollouts = MixtureRollouts(
            self.sampler,  # pyright: ignore[reportArgumentType]
            mixture=HALF,
            settings=lambda step: SamplingSettings(4),
            seed=3,
            teacher_completion=lambda request: pytest.fail("no teacher here"),
            prompts={draw.prompt.index: draw.prompt for draw in DRAWS},
            options=RolloutConfig(replay=ReplayConfig(**replay)),
            teacher_scores=lambda rollouts: pytest.fail("no teacher here"),
        )

    def step(self) -> list[Rollout]:
        self.sampler.weights_version = len(self.steps)
        self.steps.append(self.rollouts.sample(DRAWS, len(self.steps)))
        return self.steps[-1]

    def replayed(self, step: int) -> list[Rollout]:
        return [rollout for rollout in self.steps[step] if rollout.source == "replay"]


def test_what_is_replayed_was_sampled_before() -> None:
    run = Trained(size=20, max_age=3)
    for step in range(8):
        assert len(run.step()) == 12
        earlier = {(r.weights_version, r.draw, r.completion_ids, r.logprobs) for past in run.steps[:step] for r in past
                   if r.source == "student"}  # fmt: skip
        replayed = run.replayed(step)
        found = {(r.weights_version, r.draw, r.completion_ids, r.logprobs) for r in replayed}
        assert found <= earlier and len(found) == len(replayed), "none twice"
        assert all(r.weights_version is not None and 1 <= step - r.weights_version <= 3 for r in replayed)
    assert not run.replayed(0), "the student samples while there is nothing"
    assert all(run.replayed(step) for step in range(1, 8))
    assert len(run.rollouts.saved()["replay"]) == 20


def test_what_is_too_old_is_sampled_by_the_student() -> None:
    run = Trained(size=100, max_age=1)
    run.step()
    run.steps += [[], []]  # nothing was sampled
    assert {rollout.source for rollout in run.step()} == {"student"}


def test_it_goes_on_from_a_checkpoint() -> None:
    whole, again = Trained(size=20, max_age=5), Trained(size=20, max_age=5)
    for _ in range(4):
        whole.step()
    again.steps = list(whole.steps)
    again.rollouts.restore(json.loads(json.dumps(whole.rollouts.saved())))
    assert again.step() == whole.step()
    assert again.replayed(4) and again.rollouts.saved() == whole.rollouts.saved()


def test_an_older_student_is_no_mismatch() -> None:
    """The sampler's log-probabilities are compared with the trainer's where both had the same weights."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 8, generator=generator) for rows in (6, 11))
    batch = TokenBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        score_index=torch.zeros(6, dtype=torch.int64),
        labels=torch.arange(6),
        weights=torch.ones(6),
        sampler_logprobs=torch.full((6,), -30.0),
        sequence_index=torch.tensor([0, 0, 1, 1, 1, 2]),
        teacher=HiddenScores(states, OutputHead(weight)),
        sample_ids=("a", "b", "c"),
        sources=("student", "replay", "student"),
        completion_lengths=(2, 3, 1),
    )
    sums = ObjectiveHead(OutputHead(weight), 11, torch.float32)(states, batch, divergence_objective("forward_kl"))
    assert isinstance(sums, ObjectiveSums)
    assert sums.mismatch[0] == 3 and math.isfinite(sums.mismatch[1])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": {"kind": "policy_gradient", "on": ["replay"]}},
            r"objective\.on: policy_gradient is for the student's own samples, not for replay",
        ),
        (
            {"rollout": {"placement": "served", "addresses": ["http://127.0.0.1:1"], "staleness": 1}},
            r"mixture\.replay: has no meaning with rollout\.staleness = 1",
        ),
        ({"rollout": {"replay": {"size": 0}}}, r"rollout\.replay\.size"),
    ],
)
def test_what_it_is_refused_with(sections: dict[str, Any], message: str) -> None:
    base = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    with pytest.raises(ConfigError, match=message):
        make_config({**base, "mixture": {"student": 0.5, "replay": 0.5}, **sections})
