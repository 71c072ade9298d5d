"""Steps that training must not go on from, and what is kept of those before them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_prompts

from gkd.config import Config, Launch, make_config
from gkd.errors import LossScaleError, MismatchError, NonFiniteError, RunError
from gkd.objectives.mismatch import mismatch_means, mismatch_sums
from gkd.planning.settled import settle_here
from gkd.rollout.sync import SyncedSampler
from gkd.run_files import RunFiles
from gkd.train import distributed
from gkd.train.checkpoint import saved_steps
from gkd.train.guards import LossScaleGuard, MismatchGuard
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.types import Completion, SampleRequest, SamplingSettings


def k3_of(*log_ratios: float) -> float:
    values = torch.tensor(log_ratios, dtype=torch.float64)
    sums = mismatch_sums(values, torch.ones(len(values), dtype=torch.bool))
    return mismatch_means(*(one.item() for one in sums)).get("k3", 0.0)


def test_a_mismatch_warns_once_with_the_key_that_helps(caplog: pytest.LogCaptureFixture) -> None:
    guard = MismatchGuard(5.0, "set student.dtype: float32")
    with caplog.at_level(logging.WARNING, "gkd"):
        guard.check(k3_of(-1.3), 0)  # k3 0.57
        guard.check(k3_of(-1.4), 1)
    (said,) = caplog.messages
    assert said.startswith("step 0: sampler and trainer disagree on the sampled tokens: mismatch/k3 is 0.573 nats")
    assert "; set student.dtype: float32 (" in said and "rollout.max_mismatch = 5" in said


def test_what_rounding_alone_does_is_no_mismatch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gkd"):
        MismatchGuard(5.0).check(k3_of(-1.08, 0.4, 0.0), 0)  # largest k3 of a token 0.42
        MismatchGuard(5.0).check(k3_of(), 0)  # nothing was sampled
    assert not caplog.messages


@pytest.mark.parametrize("log_ratio", [-6.2, 2.2, 800.0, math.nan])
def test_a_large_mismatch_stops_the_run(log_ratio: float) -> None:
    with pytest.raises(MismatchError, match=r"step 7: .* than rollout\.max_mismatch = 5; the optimizer did not step"):
        MismatchGuard(5.0).check(k3_of(log_ratio), 7)
    if math.isfinite(log_ratio):
        MismatchGuard(math.inf).check(k3_of(log_ratio), 7)


def test_steps_that_are_left_out_are_counted_in_a_row() -> None:
    guard = LossScaleGuard(3, steps=100)
    for norm in (math.inf, math.inf, 1.0, math.nan, math.inf):
        guard.check(norm, 0)
    with pytest.raises(LossScaleError, match=r"step 9: the gradients were infinite in each of the last 3 steps"):
        guard.check(math.inf, 9)
    with pytest.raises(LossScaleError, match=r"last 2 steps.*student\.dtype"):  # a run of which every step was left out
        short = LossScaleGuard(20, steps=2)
        short.check(math.inf, 0)
        short.check(math.inf, 1)


class Liar:
    """A sampler whose log-probabilities are of another temperature, say, from one batch on."""

    def __init__(self, sampler: SyncedSampler, honest_batches: int) -> None:
        self._sampler, self._honest = sampler, honest_batches
        self.load_weights, self.sleep, self.close = sampler.load_weights, sampler.sleep, sampler.close

    @property
    def weights_version(self) -> int | None:
        return self._sampler.weights_version

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        honest, self._honest = self._honest > 0, self._honest - bool(requests)
        made = self._sampler.generate(requests, settings)
        return made if honest else [replace(c, logprobs=tuple(lp - 3.0 for lp in c.logprobs)) for c in made]


class RunWithLiar(Run):
    honest_batches = 2

    def build_sampler(self) -> Any:
        return Liar(super().build_sampler(), self.honest_batches)


class RunWithNaN(Run):
    """A teacher whose states are NaN in the third step."""

    def build_teacher(self) -> Any:
        teacher, steps = super().build_teacher(), iter(range(9))

        class Spoilt:
            def score(self, rollouts: Any) -> Any:
                scores = teacher.score(rollouts)
                if next(steps) == 2:
                    scores[0].states[0, 0] = math.nan  # pyright: ignore[reportAttributeAccessIssue]
                return scores

        return Spoilt()


class StarvedRun(Run):
    """Memory does not suffice for the second step's second micro-batch."""

    def build_student(self) -> Any:
        student, calls = super().build_student(), iter(range(99))
        engine: Any = student._engine
        forward = engine.module.forward

        def starved(*args: Any, **kwargs: Any) -> Any:
            is_training = torch.is_grad_enabled()
            return torch.empty(1 << 55) if is_training and next(calls) == 3 else forward(*args, **kwargs)

        engine.module.forward = starved
        return student


@pytest.fixture
def config(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    asked = make_config(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": 4},
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(save_prompts(tmp_path / "train.jsonl", 8)), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": 6},
            "optim": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
        }
    )
    return settle_here(asked, 0, 1).config


def run(kind: type[Run], config: Config, folder: Path, *, resume: bool = False) -> Path:
    """`final` of a run in `folder`."""
    files = RunFiles(folder)
    files.path.mkdir(exist_ok=True)
    distributed.initialize(Launch())
    with closing(ask_placements(config)) as placements:
        kind(config, Launch(), files, placements, resume=resume).train(0.0)
    return files.final


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(("kind", "error"), [(RunWithLiar, MismatchError), (RunWithNaN, NonFiniteError)])
def test_a_step_that_is_refused_costs_no_step_before_it(
    config: Config, tmp_path: Path, kind: type[Run], error: type[Exception]
) -> None:
    """Nothing was to be saved, and the two steps before are kept: the run goes on from there, bit by bit the same."""
    whole = run(Run, config, tmp_path / "whole")
    with pytest.raises(error, match=r"^step 2: "):
        run(kind, config, tmp_path / "run")
    assert saved_steps(RunFiles(tmp_path / "run").checkpoints) == [2]
    resumed = run(Run, config, tmp_path / "run", resume=True)
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(resumed / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
@pytest.mark.fault
def test_memory_that_does_not_suffice_names_the_keys_and_makes_no_half_step(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"^forward and backward .*; lower optim\.micro_batch_size or micro_batch_tokens"
    ):
        run(StarvedRun, config, tmp_path / "run")
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 1
