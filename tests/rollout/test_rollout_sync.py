"""A sync is complete and proven, or nothing is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd.errors import WeightSyncError
from gkd.rollout.base import Sampler
from gkd.rollout.sync import PROBE_TOKENS, SyncedSampler, Tolerance, probe_text
from gkd.types import SampleRequest, SamplingSettings

Pairs = Iterator[tuple[str, torch.Tensor]]
SETTINGS = SamplingSettings(4)
PROMPTS = [[1, 40, 41], [1, 50, 51, 52], list(range(3, 250))]
PROBES = partial(probe_text, PROMPTS, 259, 0)
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

    def exact_logprobs(self, token_ids: Sequence[int], start: int) -> list[float] | None:
        return self.token_logprobs(token_ids, start)


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
    return SyncedSampler(sampler, probe_ids=PROBES, tolerance=Tolerance(1e-3))


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


class Between:
    """A sampler that gets something else than it was sent."""

    def __init__(self, sampler: Sampler, change: Callable[[Pairs], Iterable[tuple[str, torch.Tensor]]]) -> None:
        self.generate, self.probe, self.close = sampler.generate, sampler.probe, sampler.close
        self.held_weights, self.sleep = sampler.held_weights, sampler.sleep
        self._sampler, self._change = sampler, change

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._sampler.update_weights(self._change(iter(list(weights))), version)

    def accept_weights(self) -> None:
        raise AssertionError("weights that are not proven were accepted")


def shuffled_outside_the_probe(version: int) -> Callable[[Pairs], Pairs]:
    def shuffle(embedding: torch.Tensor) -> torch.Tensor:
        rows = [i for i in range(len(embedding)) if i not in PROBES(version)][:2]
        changed = embedding.clone()
        changed[rows] = embedding[rows[::-1]]
        return changed

    return changed(EMBED, shuffle)


@pytest.mark.fault
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_a_version_behind_in_bfloat16_is_caught(lr: float, model: PreTrainedModel, hf_half_sampler: Sampler) -> None:
    """The probe's log-probabilities are within what rounding does: the contents are not."""
    sampler = hf_half_sampler
    synced = SyncedSampler(sampler, probe_ids=PROBES, tolerance=Tolerance(0.5), sent_dtype="bfloat16")
    synced.load_weights(ModelWeights(model), version=1)
    old = [(name, p.detach().bfloat16()) for name, p in model.named_parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += lr * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)).sign()  # Adam's
    synced._sampler = Between(sampler, lambda pairs: old)
    with pytest.raises(
        WeightSyncError, match=r"holds other weights than it was sent, in \d+ tensors, the first is model"
    ):
        synced.load_weights(ModelWeights(model), version=2)


@pytest.mark.fault
def test_rows_of_the_embedding_that_no_probe_reads(synced: SyncedSampler, model: PreTrainedModel) -> None:
    synced.load_weights(ModelWeights(model), version=1)
    synced._sampler = Between(synced._sampler, shuffled_outside_the_probe(2))
    with pytest.raises(WeightSyncError, match=f"other weights than it was sent, in 1 tensors, the first is {EMBED}"):
        synced.load_weights(ModelWeights(model), version=2)


@pytest.mark.fault
@pytest.mark.vllm
def test_a_tied_head_that_stays_on_its_old_packed_weights(
    vllm_sampler: Sampler, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = SyncedSampler(vllm_sampler, probe_ids=PROBES, tolerance=Tolerance(0.5))
    synced.load_weights(ModelWeights(model), version=1)
    with torch.no_grad():
        model.get_parameter(EMBED).mul_(1 + 1e-6)
    with monkeypatch.context() as without:
        without.setattr("gkd.engines.sampling.refresh_tied_head", lambda model: None)
        with pytest.raises(WeightSyncError, match=f"in 1 tensors, the first is {EMBED}"):
            synced.load_weights(ModelWeights(model), version=2)
    synced.load_weights(ModelWeights(model), version=3)


def test_the_tolerance_follows_the_trainers_own_rounding(hf_sampler: Sampler, model: PreTrainedModel) -> None:
    """What differs by rounding alone passes; the same difference with a trainer that rounds less does not."""

    class Rounding(ModelWeights):
        nats = 0.4

        def exact_logprobs(self, token_ids: Sequence[int], start: int) -> list[float] | None:
            return [value + self.nats for value in self.token_logprobs(token_ids, start)]

    class Rounds(Between):
        def accept_weights(self) -> None: ...

    rounding = Rounds(hf_sampler, lambda pairs: pairs)
    rounding.probe = lambda token_ids: [[value - 0.8 for value in hf_sampler.probe(token_ids)[0]]]
    half = Tolerance.of(None, "bfloat16")
    synced = SyncedSampler(rounding, probe_ids=PROBES, tolerance=half)
    synced.load_weights(Rounding(model), version=1)
    assert synced.tolerance == pytest.approx(4 * 0.4)
    Rounding.nats = 0.01
    synced.load_weights(Rounding(model), version=2)  # not measured at each sync
    synced.measure_rounding(Rounding(model), 2)
    with pytest.raises(WeightSyncError, match=r"differ from the trainer's by 0\.8 .* the tolerance is 0\.05"):
        synced.load_weights(Rounding(model), version=3)
    assert Tolerance.of(0.3, "bfloat16").limit(9.0) == 0.3 and Tolerance.of(None, "float32").limit(None) == 1e-3


@pytest.mark.fault
@pytest.mark.parametrize("seen", ["refused", "contents", "log-probabilities"])
def test_a_known_fault_of_the_engine_is_named(
    seen: str, hf_sampler: Sampler, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faulty(Between):
        def update_weights(self, weights: Pairs, version: int) -> None:
            if seen == "refused":
                raise WeightSyncError("vLLM does not take the student's weights")
            super().update_weights(weights, version)

    change = changed("model.norm.weight", lambda tensor: tensor + 1)
    faulty = Faulty(hf_sampler, change if seen == "contents" else lambda pairs: pairs)
    if seen == "log-probabilities":
        faulty.probe = lambda token_ids: [[value - 0.8 for value in hf_sampler.probe(token_ids)[0]]]
    fault = "set rollout.engine: transformers"
    synced = SyncedSampler(faulty, probe_ids=PROBES, tolerance=Tolerance(1e-3), known_fault=fault)
    with pytest.raises(WeightSyncError, match=f"; {fault}$"):
        synced.load_weights(ModelWeights(model), version=1)


@pytest.mark.fault
@pytest.mark.vllm
def test_which_form_of_a_tensor_is_compared(
    vllm_sampler: Sampler, hf_sampler: Sampler, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them in one form at least: a matrix that vLLM packs by its columns, the rest bit by bit."""
    for sampler in (vllm_sampler, hf_sampler):
        sampler.update_weights(iter(ModelWeights(model)), 1)
        (held,) = sampler.held_weights(1)
        assert held.whole.keys() | held.columns.keys() == dict(model.named_parameters()).keys()
        SyncedSampler(sampler, probe_ids=PROBES, tolerance=Tolerance(1e-3)).load_weights(ModelWeights(model), 2)
    assert not caplog.messages, "nothing is left to the probe alone"


class AwaySampler(Between):
    """Takes no update for a second."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(sampler, lambda pairs: pairs)
        self._back = time.monotonic() + 1.0
        self.accept_weights = sampler.accept_weights

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if time.monotonic() < self._back:
            raise WeightSyncError("no served sampler took the weights", is_temporary=True)
        self._sampler.update_weights(weights, version)


@pytest.mark.fault
def test_an_update_that_nobody_takes_is_sent_again(sampler: Sampler, model: PreTrainedModel) -> None:
    with pytest.raises(WeightSyncError, match="took the weights"):
        SyncedSampler(AwaySampler(sampler), probe_ids=PROBES, tolerance=Tolerance(1e-3), retry_s=0.2).load_weights(
            ModelWeights(model), version=1
        )
    synced = SyncedSampler(AwaySampler(sampler), probe_ids=PROBES, tolerance=Tolerance(1e-3), retry_s=20)
    synced.load_weights(ModelWeights(model), version=1)
    assert synced.weights_version == 1


def test_a_fault_on_another_rank_stops_this_one(sampler: Sampler, model: PreTrainedModel) -> None:
    synced = SyncedSampler(
        sampler, probe_ids=PROBES, tolerance=Tolerance(1e-3), max_over_ranks=lambda value: value + 1.0
    )
    with pytest.raises(WeightSyncError):
        synced.load_weights(ModelWeights(model), version=1)


def test_a_probe_is_longer_than_a_cache_block_and_another_one_each_time() -> None:
    probe = PROBES(3)
    assert len(probe) == PROBE_TOKENS > 128
    assert probe[:7] in ([*PROMPTS[0], *PROMPTS[1]], [*PROMPTS[1], 3, 4, 5], PROMPTS[2][:7])
    assert probe == PROBES(3) and probe != PROBES(4) and PROBES(3) != probe_text(PROMPTS, 259, 1, 3)
    read = {token for version in range(20) for token in PROBES(version)[PROBE_TOKENS // 2 :]}
    assert len(read) > 250, "all of the vocabulary, in time"
