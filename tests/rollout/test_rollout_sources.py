"""Who draws the tokens of a source's texts is said once, with its registration, and everybody goes by that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gkd.config import MixtureConfig, RolloutConfig, make_config
from gkd.errors import ConfigError
from gkd.measures.samples import generated_tokens
from gkd.objectives.objective import divergence_objective
from gkd.plugins import register_source
from gkd.registry import SOURCES, Drawn
from gkd.rollout.mixture import MixtureRollouts
from gkd.rollout.sources.student import StudentSource
from gkd.teacher.cache import CachedTeacher
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
    TeacherScores,
    TokenBatch,
)

HEAD = OutputHead(torch.eye(4))
DRAWS = [PromptDraw(Prompt(i, (i + 10, 5), ""), 0) for i in range(4)]
BASE = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}


@pytest.fixture(params=list(Drawn))
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """Of a source of a plugin's, `mine`."""
    monkeypatch.setattr(SOURCES, "_found", dict(SOURCES._found))
    monkeypatch.setattr(SOURCES, "_drawn", dict(SOURCES._drawn))
    register_source("mine", StudentSource, request.param)
    return request.param


class EchoSampler:
    weights_version = 0

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        return [Completion((3, 1), (-1.0, -1.0), "length") for _ in requests]

    def sleep(self) -> None: ...


class Zeros:
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        return [HiddenScores(torch.zeros(len(rollout.completion_ids), 4), HEAD) for rollout in rollouts]


def sampled() -> tuple[MixtureRollouts, list[Rollout]]:
    rollouts = MixtureRollouts(
        EchoSampler(),  # pyright: ignore[reportArgumentType]
        mixture=MixtureConfig.model_validate({"student": 0.0, "mine": 0.99, "replay": 0.01}),
        settings=lambda step: SamplingSettings(2),
        seed=0,
        teacher_completion=lambda request: pytest.fail("no teacher here"),
        prompts={draw.prompt.index: draw.prompt for draw in DRAWS},
        options=RolloutConfig(),
        teacher_scores=lambda rollouts: [],
    )
    return rollouts, [rollout for rollout in rollouts.sample(DRAWS, 0) if rollout.source == "mine"]


def test_what_is_counted_and_what_is_replayed(drawn: Drawn) -> None:
    rollouts, own = sampled()
    assert generated_tokens(own) == (8 if drawn.in_step else 0)
    assert len(rollouts.saved()["replay"]) == (4 if drawn is Drawn.BY_STUDENT else 0)


def test_what_a_cache_of_scores_keeps(drawn: Drawn, tmp_path: Path) -> None:
    CachedTeacher(Zeros, tmp_path, limit_bytes=1 << 20, device=torch.device("cpu")).score(sampled()[1][:1])
    assert len(list(tmp_path.glob("*.sealed"))) == (1 if drawn is Drawn.ELSEWHERE else 0)


def test_what_a_mismatch_between_engines_is_about(drawn: Drawn) -> None:
    """Of two engines with the same weights."""
    batch = TokenBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        score_index=torch.zeros(2, dtype=torch.int64),
        labels=torch.tensor([3, 1]),
        weights=torch.ones(2),
        sampler_logprobs=torch.full((2,), -1.0),
        sequence_index=torch.zeros(2, dtype=torch.int64),
        teacher=HiddenScores(torch.zeros(2, 4), HEAD),
        sample_ids=("a",),
        sources=("mine",),
        completion_lengths=(2,),
    )
    sums = ObjectiveHead(HEAD, 4, torch.float32)(torch.zeros(2, 4), batch, divergence_objective("forward_kl"))
    assert isinstance(sums, ObjectiveSums) and sums.mismatch[0] == (2 if drawn.in_step else 0)


def test_what_a_term_for_the_students_own_is_for(drawn: Drawn) -> None:
    config = {**BASE, "mixture": {"student": 0.0, "mine": 1.0}}
    for options, allowed in (
        ({}, {Drawn.BY_STUDENT}),
        ({"advantage": "teacher"}, {Drawn.BY_STUDENT, Drawn.FROM_MIXTURE}),
    ):
        config["objective"] = {"kind": "policy_gradient", **options}
        if drawn in allowed:
            make_config(config)
        else:
            with pytest.raises(ConfigError, match="policy_gradient is for the student's own samples, not for mine"):
                make_config(config)
