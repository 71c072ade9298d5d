"""The lambda mixture is exact for each sample, and a pure function of (seed, step, prompt, sample)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from gkd.config import MixtureConfig, RolloutConfig
from gkd.errors import DataError, SamplerError, WeightSyncError
from gkd.rollout.mixture import MixtureRollouts, draw_source, mixture_counts, teacher_requests
from gkd.rollout.sources.teacher import teacher_request
from gkd.seeding import derive_seed
from gkd.types import Completion, Prompt, PromptDraw, SampleRequest, SamplingSettings, WeightStream

SETTINGS = SamplingSettings(max_new_tokens=4)


def mixture(student: float, teacher: float = 0.0, dataset: float = 0.0) -> MixtureConfig:
    return MixtureConfig(student=student, teacher=teacher, dataset=dataset)


def draws(count: int, *, completion: bool = True, samples: int = 1) -> list[PromptDraw]:
    prompts = [Prompt(i, (i + 10, 5), f"prompt {i}", (7, 2) if completion else None, f"d:{i}") for i in range(count)]
    return [PromptDraw(prompt, sample) for prompt in prompts for sample in range(samples)]


class EchoSampler:
    """Answers with the request's seed, so that a test sees which request made which rollout."""

    def __init__(self, version: int | None = 0) -> None:
        self.weights_version = version
        self.requests: list[SampleRequest] = []
        self.sleeps = 0

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        self.requests += requests
        return [Completion((r.seed % 251,), (-1.0,), "length") for r in requests]

    def sleep(self) -> None:
        self.sleeps += 1

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        self.weights_version = version
        return {"sync/mean_logprob_error": 0.0}

    def fall_behind(self) -> None:
        self.weights_version = None


def rollouts_of(sampler: EchoSampler, config: MixtureConfig, seed: int = 3, staleness: int = 0) -> MixtureRollouts:
    return MixtureRollouts(
        sampler,  # pyright: ignore[reportArgumentType]
        mixture=config,
        settings=lambda step: SETTINGS,
        seed=seed,
        teacher_completion=lambda request: Completion((100, request.seed % 97), (-1.0, -1.0), "stop"),
        prompts={},
        options=RolloutConfig(),
        teacher_scores=lambda rollouts: [],
        staleness=staleness,
    )


def test_fractions_hold_for_each_sample() -> None:
    config = mixture(0.5, 0.3, 0.2)
    sources = [draw_source(config.at(step), 0, step, draw) for step in range(40) for draw in draws(50, samples=2)]
    for source, fraction in (("student", 0.5), ("teacher", 0.3), ("dataset", 0.2)):
        assert abs(sources.count(source) / len(sources) - fraction) < 0.03, source  # 4000 draws: 0.03 is 3.8 sigma


@pytest.mark.parametrize(
    ("config", "only"), [(mixture(1.0), "student"), (mixture(0.0, 1.0), "teacher"), (mixture(0.0, 0.0, 1.0), "dataset")]
)
def test_pure_mixtures_are_pure(config: MixtureConfig, only: str) -> None:
    assert {draw_source(config.at(step), 0, step, d) for step in range(20) for d in draws(50)} == {only}


def test_samples_of_one_prompt_are_drawn_separately() -> None:
    sources = {draw_source(mixture(0.5, 0.5).at(0), 0, 0, PromptDraw(draws(1)[0].prompt, i)) for i in range(20)}
    assert sources == {"student", "teacher"}


def test_rollouts_stand_in_the_order_of_the_draws() -> None:
    sampler, config, asked = EchoSampler(), mixture(0.4, 0.3, 0.3), draws(60)
    rollouts = rollouts_of(sampler, config).sample(asked, step=0)
    assert [r.draw for r in rollouts] == asked
    for rollout in rollouts:
        index = rollout.draw.prompt.index
        if rollout.source == "student":
            assert rollout.completion_ids == (derive_seed(3, "sample", 0, index, 0) % 251,)
            assert rollout.logprobs == (-1.0,) and rollout.weights_version == 0
        elif rollout.source == "teacher":
            assert rollout.completion_ids == (100, teacher_request(3, rollout.draw).seed % 97)
            assert rollout.logprobs is None and rollout.weights_version is None
        else:
            assert rollout.completion_ids == (7, 2)
    counts = mixture_counts(rollouts, config)
    assert sum(counts.values()) == 60 and min(counts.values()) > 5
    assert len(sampler.requests) == counts["student"], "only the student's samples are generated"


def test_ranks_draw_what_one_process_draws() -> None:
    config, asked = mixture(0.5, 0.5), draws(24)
    whole = rollouts_of(EchoSampler(), config).sample(asked, step=0)
    halves = [rollouts_of(EchoSampler(), config).sample(asked[rank::2], step=0) for rank in range(2)]
    assert whole[0::2] == halves[0] and whole[1::2] == halves[1]


def test_seeds_differ_between_steps_prompts_and_samples() -> None:
    seeds: list[int] = []
    for step in range(3):
        sampler = EchoSampler(step)
        rollouts_of(sampler, mixture(1.0)).sample(draws(4, samples=3), step)
        seeds += [request.seed for request in sampler.requests]
    assert len(set(seeds)) == 36


def test_teacher_requests_are_those_that_the_run_will_make() -> None:
    config, steps = mixture(0.5, 0.5), [(step, draws(8)) for step in range(5)]
    planned = teacher_requests(config, 3, steps)
    asked: set[SampleRequest] = set()
    for step, step_draws in steps:
        rollouts = rollouts_of(EchoSampler(step), config).sample(step_draws, step)
        asked |= {teacher_request(3, r.draw) for r in rollouts if r.source == "teacher"}
    assert set(planned) == asked and len(planned) == len(asked)


def test_stale_weights_are_refused() -> None:
    for version in (None, 0, 2):
        with pytest.raises(SamplerError, match=f"step 1 would sample from weights of version {version}"):
            rollouts_of(EchoSampler(version), mixture(1.0)).sample(draws(1), step=1)


def test_a_missing_completion_names_its_row() -> None:
    with pytest.raises(DataError, match=r"d:0: mixture\.dataset > 0 needs a completion"):
        rollouts_of(EchoSampler(), mixture(0.0, 0.0, 1.0)).sample(draws(1, completion=False), step=0)


def test_weight_sync_error_is_a_run_error() -> None:
    assert WeightSyncError.exit_code == 1


@pytest.mark.parametrize(("staleness", "first"), [(0, 3), (2, 1)])
def test_weights_that_nobody_samples_from_are_not_sent(staleness: int, first: int) -> None:
    """Nothing is the student's before step 3; of the versions before only those that step 3 may sample from are sent.
    The sampler is marked as behind, so that nothing can be sampled from it by mistake."""
    ramp = {
        "student": {"from": 0.0, "to": 1.0, "start": 2, "steps": 2},
        "dataset": {"from": 1.0, "to": 0.0, "start": 2, "steps": 2},
    }
    config = MixtureConfig.model_validate(ramp)
    sampler = EchoSampler()
    rollouts, weights = rollouts_of(sampler, config, staleness=staleness), cast("WeightStream", None)
    sent: list[int] = []
    for step in range(4):
        rollouts.sample(draws(8), step)
        if rollouts.load_weights(weights, step + 1):
            sent.append(step + 1)
        else:
            assert sampler.weights_version is None
    assert sent == [version for version in range(1, 5) if version >= first]


def test_a_replayed_text_may_need_the_sampler() -> None:
    config = MixtureConfig.model_validate({"student": 0.0, "replay": 1.0})
    assert rollouts_of(EchoSampler(), config).load_weights(cast("WeightStream", None), 1)
