"""Sampling ahead: which weights a batch comes from, what is never begun, and that nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd.config import RolloutConfig, make_config
from gkd.errors import SamplerError
from gkd.rollout.ahead import SampleAhead
from gkd.rollout.base import Sampler
from gkd.rollout.mixture import MixtureRollouts
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text
from gkd.types import Completion, Prompt, PromptDraw, SampleRequest, SamplingSettings

LAST_STEP = 5
MIXTURE = make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}).mixture


class Weights:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        logprobs = self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        return [logprobs[i - 1, token_ids[i]].item() for i in range(start, len(token_ids))]


class Watched:
    """The real sampler, which can be held up or made to fail, and notes what it was asked."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.held_up_at = self.fails_at = 10**9  # batches
        self.may_go_on = threading.Event()
        self.batches = 0
        self.probe, self.accept_weights, self.close = sampler.probe, sampler.accept_weights, lambda: None
        self.update_weights, self.held_weights, self.sleep = sampler.update_weights, sampler.held_weights, sampler.sleep

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        if self.batches >= self.held_up_at:
            assert self.may_go_on.wait(30)
        self.batches += 1
        if self.batches > self.fails_at:
            raise SamplerError("it died")
        return self.sampler.generate(requests, settings)


def batch(step: int) -> list[PromptDraw]:
    return [PromptDraw(Prompt(10 * step + i, (1, 40 + step, 50 + i), ""), 0) for i in range(2)]


class Run:
    """A trainer's side: `step` samples, pretends to train, and hands the weights over."""

    def __init__(self, sampler: Sampler, model: PreTrainedModel, staleness: int) -> None:
        self.watched, self.weights = Watched(sampler), Weights(model)
        self.synced = SyncedSampler(
            self.watched, probe_ids=partial(probe_text, [[1, 40, 41]], 259, 0), tolerance=Tolerance(1e-3)
        )
        self.synced.load_weights(self.weights, 0)
        rollouts = MixtureRollouts(
            self.synced, mixture=MIXTURE, settings=lambda step: SamplingSettings(4), seed=3, staleness=staleness,
            teacher_completion=lambda _: pytest.fail("no teacher here"), prompts={}, options=RolloutConfig(),
            teacher_scores=lambda rollouts: [],
        )  # fmt: skip
        self.ahead = SampleAhead(
            rollouts, batch=batch, last_step=LAST_STEP, staleness=staleness, sum_over_ranks=lambda values: [*values]
        )

    def step(self, step: int) -> tuple[set[Any], dict[str, float]]:
        rollouts = self.ahead.sample(batch(step), step)
        assert [r.draw for r in rollouts] == batch(step)
        return {r.weights_version for r in rollouts}, self.ahead.load_weights(self.weights, step + 1)


@pytest.fixture
def model(tiny_student: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).eval()


def test_one_step_ahead_the_weights_are_one_step_old(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    run = Run(hf_sampler, model, 1)
    for step in range(LAST_STEP + 1):
        versions, metrics = run.step(step)
        assert versions == {max(0, step - 1)}
        assert metrics["rollout/staleness"] == min(step, 1) and metrics["weights_version"] == max(0, step - 1)
    assert run.watched.batches == LAST_STEP + 1, "nothing is sampled beyond the last step"


@pytest.mark.parametrize("staleness", [2, 4])
def test_the_age_is_bounded_however_far_ahead(hf_sampler: Sampler, model: PreTrainedModel, staleness: int) -> None:
    run = Run(hf_sampler, model, staleness)
    for step in range(LAST_STEP + 1):
        (version,), metrics = run.step(step)
        assert step - staleness <= version <= max(0, step - 1)
        assert metrics["rollout/staleness"] == step - version
    assert run.watched.batches == LAST_STEP + 1


def test_an_update_waits_for_the_other_ranks(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    """Their batches come from the same servers: what all ranks do together comes between the last batch and it."""
    run, order = Run(hf_sampler, model, 1), list[str]()
    inner = run.watched.update_weights

    def update(weights: Any, version: int) -> None:
        order.append("update")
        inner(weights, version)

    def agree(values: Sequence[float]) -> list[float]:
        order.append("all ranks")
        return [*values]

    run.watched.update_weights, run.ahead._sum_over_ranks = update, agree
    run.step(0)
    assert order[:2] == ["all ranks", "update"]


def test_an_update_waits_for_the_next_batch(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    run = Run(hf_sampler, model, 1)
    run.watched.held_up_at = 1
    run.ahead.sample(batch(0), 0)
    updated = threading.Event()

    def update() -> None:
        run.ahead.load_weights(run.weights, 1)
        updated.set()

    threading.Thread(target=update, daemon=True).start()
    assert not updated.wait(0.3), "the batch of step 1 is being sampled"
    run.watched.may_go_on.set()
    assert updated.wait(30)
    assert {r.weights_version for r in run.ahead.sample(batch(1), 1)} == {0}


@pytest.mark.fault
def test_an_error_comes_in_the_step_that_it_hit(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    run = Run(hf_sampler, model, 1)
    run.watched.fails_at = 2
    run.step(0)
    run.step(1)
    with pytest.raises(SamplerError, match="it died"):
        run.ahead.sample(batch(2), 2)


@pytest.mark.fault
def test_weights_that_are_too_old_are_refused(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    run = Run(hf_sampler, model, 1)
    with pytest.raises(SamplerError, match="step 2 would sample from weights of version 0"):
        run.ahead.sample(batch(2), 2)


def test_closing_does_not_wait_for_a_sampler_that_hangs(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    others = set(threading.enumerate())  # of tests that leave theirs waiting
    run = Run(hf_sampler, model, 1)
    run.watched.held_up_at = 1
    run.ahead.sample(batch(0), 0)
    started = time.monotonic()
    run.ahead.close()
    assert time.monotonic() - started < 5
    run.watched.may_go_on.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(30)
        assert not thread.is_alive()
    assert run.watched.batches <= 2, "nothing further was begun"
