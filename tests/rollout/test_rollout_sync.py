"""A sync is complete and proven, or nothing is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd.errors import WeightSyncError
from gkd.rollout.base import Sampler
from gkd.rollout.sync import PROBE_TOKENS, SyncedSampler, probe_prompt
from gkd.types import SampleRequest, SamplingSettings

Pairs = Iterator[tuple[str, torch.Tensor]]
SETTINGS = SamplingSettings(4)
PROBE = probe_prompt([[1, 40, 41], [1, 50, 51, 52], list(range(3, 250))])
REQUEST = SampleRequest((1, 87, 85), 0)


class ModelWeights:
    """A `WeightStream` over a plain model, with a fault between trainer and sampler if wanted."""

    def __init__(self, model: PreTrainedModel, fault: Callable[[Pairs], Pairs] = lambda pairs: pairs) -> None:
        self.model, self.fault = model, fault
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __iter__(self) -> Pairs:
        return self.fault((name, p.detach()) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        logprobs = self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        return [logprobs[i - 1, token_ids[i]].item() for i in range(start, len(token_ids))]


@pytest.fixture
def model(tiny_student: Path) -> PreTrainedModel:
    """A trained student: other weights than the sampler was started with."""
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(1.02 + 0.02 * (index % 5))  # every one changes, the tied head too
    return model


@pytest.fixture
def synced(sampler: Sampler) -> SyncedSampler:
    return SyncedSampler(sampler, probe_ids=PROBE, tolerance=1e-3)


def test_a_sync_sets_the_version_and_its_errors_are_tiny(synced: SyncedSampler, model: PreTrainedModel) -> None:
    metrics = synced.load_weights(ModelWeights(model), version=7)
    assert synced.weights_version == 7
    assert metrics["sync/mean_logprob_error"] <= metrics["sync/max_logprob_error"] < 1e-4
    assert len(synced.generate([REQUEST], SETTINGS)) == 1


def test_nothing_is_generated_before_the_first_sync(synced: SyncedSampler) -> None:
    with pytest.raises(WeightSyncError, match="no complete, proven weights"):
        synced.generate([REQUEST], SETTINGS)


def skip(name: str) -> Callable[[Pairs], Pairs]:
    return lambda pairs: ((n, t) for n, t in pairs if n != name)


def twice(name: str) -> Callable[[Pairs], Pairs]:
    return lambda pairs: ((n, t) for n, t in pairs for _ in range(2 if n == name else 1))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pairs], Pairs]:
    return lambda pairs: ((n, change(t) if n == name else t) for n, t in pairs)


Q_PROJ, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (skip(Q_PROJ), f"1 not sent, the first is {Q_PROJ}"),
        (skip(EMBED), f"the first is {EMBED}"),
        (twice("model.norm.weight"), r"model\.norm\.weight: unknown or sent twice"),
        (changed(Q_PROJ, lambda t: t[:-1]), r"q_proj\.weight: shape \(63, 64\), expected \(64, 64\)"),
        (changed(Q_PROJ, torch.zeros_like), "differ from the trainer's by"),
        (changed(EMBED, lambda t: t * 1.05), "differ from the trainer's by"),
        (changed("model.norm.weight", lambda t: t * float("nan")), "differ from the trainer's by"),
    ],
    ids=["skipped", "tied-head-skipped", "twice", "misshapen", "zeroed", "tied-head-stale", "nan"],
)
def test_faults_are_caught_before_the_next_generation(
    synced: SyncedSampler, model: PreTrainedModel, fault: Callable[[Pairs], Pairs], message: str
) -> None:
    synced.load_weights(ModelWeights(model), version=1)
    with pytest.raises(WeightSyncError, match=message):
        synced.load_weights(ModelWeights(model, fault), version=2)
    assert synced.weights_version is None
    with pytest.raises(WeightSyncError, match="no complete, proven weights"):
        synced.generate([REQUEST], SETTINGS)
    synced.load_weights(ModelWeights(model), version=3)  # a full sync heals it
    assert synced.weights_version == 3


@pytest.mark.fault
def test_a_sampler_that_keeps_its_old_weights_is_caught(synced: SyncedSampler, model: PreTrainedModel) -> None:
    synced.load_weights(ModelWeights(model), version=1)
    synced._sampler = DeafSampler(synced._sampler, [(name, p.clone()) for name, p in ModelWeights(model)])
    with torch.no_grad():
        model.get_parameter(Q_PROJ).mul_(1.5)
    with pytest.raises(WeightSyncError, match="differ from the trainer's by"):
        synced.load_weights(ModelWeights(model), version=2)


class DeafSampler:
    """Takes weights and keeps its own."""

    def __init__(self, sampler: Sampler, own: list[tuple[str, torch.Tensor]]) -> None:
        self.generate, self.probe, self.close = sampler.generate, sampler.probe, sampler.close
        self.sleep = sampler.sleep
        self._sampler, self._own = sampler, own

    def update_weights(self, weights: Pairs, version: int) -> None:
        for _ in weights:
            pass
        self._sampler.update_weights(self._own, version)

    def accept_weights(self) -> None:
        raise AssertionError("weights that are not proven were accepted")


class AwaySampler(DeafSampler):
    """Takes no update for a second."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler, [])
        self._back = time.monotonic() + 1.0
        self.accept_weights = sampler.accept_weights

    def update_weights(self, weights: Pairs, version: int) -> None:
        if time.monotonic() < self._back:
            raise WeightSyncError("no served sampler took the weights", is_temporary=True)
        self._sampler.update_weights(weights, version)


@pytest.mark.fault
def test_an_update_that_nobody_takes_is_sent_again(sampler: Sampler, model: PreTrainedModel) -> None:
    with pytest.raises(WeightSyncError, match="took the weights"):
        SyncedSampler(AwaySampler(sampler), probe_ids=PROBE, tolerance=1e-3, retry_s=0.2).load_weights(
            ModelWeights(model), version=1
        )
    synced = SyncedSampler(AwaySampler(sampler), probe_ids=PROBE, tolerance=1e-3, retry_s=20)
    synced.load_weights(ModelWeights(model), version=1)
    assert synced.weights_version == 1


def test_a_fault_on_another_rank_stops_this_one(sampler: Sampler, model: PreTrainedModel) -> None:
    synced = SyncedSampler(sampler, probe_ids=PROBE, tolerance=1e-3, max_over_ranks=lambda value: value + 1.0)
    with pytest.raises(WeightSyncError):
        synced.load_weights(ModelWeights(model), version=1)


def test_the_probe_is_longer_than_a_cache_block_and_made_of_prompts() -> None:
    assert len(PROBE) == PROBE_TOKENS > 128
    assert PROBE[:7] == [1, 40, 41, 1, 50, 51, 52]
    assert probe_prompt([[5]]) == [5] * PROBE_TOKENS
