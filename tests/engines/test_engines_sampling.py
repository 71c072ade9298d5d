"""What the config sets of a sampler reaches it by its name."""

from __future__ import annotations

from dataclasses import fields

from gkd.config import RolloutConfig
from gkd.engines.sampling import SamplerSpec
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
