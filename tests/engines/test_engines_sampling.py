"""What the config sets of a sampler reaches it by its name."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from gkd.config import RolloutConfig
from gkd.engines import sampling
from gkd.engines.sampling import SamplerSpec
from gkd.errors import WeightSyncError
from gkd.rollout.offline import alone

SET = {
    "engine": "vllm",
    "max_num_seqs": 3,
    "kv_cache_gib": 0.5,
    "gpu_memory_utilization": 0.7,
    "enforce_eager": False,
    "tensor_parallel": 2,
    "sleep_level": 1,
}


def spec() -> SamplerSpec:
    rollout = RolloutConfig.model_validate(SET)
    return SamplerSpec.of(rollout, model_folder="m", dtype="float32", max_model_tokens=64, seed=7)


def test_every_key_that_a_sampler_has_too_is_its_own() -> None:
    shared = {field.name for field in fields(SamplerSpec)} & RolloutConfig.model_fields.keys()
    assert shared == SET.keys()
    assert {key: getattr(spec(), key) for key in shared} == SET
    assert (spec().model_folder, spec().seed, spec().pad_token_id) == ("m", 7, 0)


def test_a_process_that_only_samples_shares_no_engine_and_does_not_sleep() -> None:
    assert (alone(spec()).tensor_parallel, alone(spec()).sleep_level) == (1, 0)
    assert alone(spec()).gpu_memory_utilization == 0.85, "nobody else needs it"


@pytest.mark.fault
def test_weights_that_vllm_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Mixtral, whose modules have other names there."""

    class Refusing:
        model_config = SimpleNamespace(get_vocab_size=lambda: 8)

        def collective_rpc(self, method: str, **arguments: object) -> None:
            raise ValueError("There is no module named 'layers.0.mlp'\nin MixtralModel")

    monkeypatch.setattr(sampling, "start_llm", lambda spec: Refusing())
    with pytest.raises(WeightSyncError, match=r"vLLM does not take the student's weights: There is no module named"):
        sampling.VllmSampler(spec()).update_weights([], 1)
