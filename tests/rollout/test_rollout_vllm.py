"""What only vLLM has: states in a cache that outlive their weights, and memory to give back."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from launching import check, run_python
from tiny import claim_tied, save_tiny_model
from transformers import AutoModelForCausalLM

from gkd.engines.sampling import SamplerSpec
from gkd.errors import SamplerError
from gkd.rollout.base import Sampler
from gkd.rollout.offline import start_sampler
from gkd.types import SampleRequest, SamplingSettings

JOB = Path(__file__).parent / "sleeping_job.py"
REQUESTS = [SampleRequest((1, 87 + i, 85), 1000 + i) for i in range(3)]
SETTINGS = SamplingSettings(6)
Weights = list[tuple[str, torch.Tensor]]


@pytest.fixture
def weights(tiny_student: Path) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    return [(name, p.detach()) for name, p in model.named_parameters()]


@pytest.mark.fault
@pytest.mark.vllm
def test_a_probe_finds_states_of_older_weights(
    vllm_sampler: Sampler, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tuple(3 + (11 * i) % 250 for i in range(200))
    vllm_sampler.update_weights(weights, version=0)
    vllm_sampler.probe(text)
    monkeypatch.setattr("gkd.engines.sampling.drop_prefix_cache", lambda engine: None)
    vllm_sampler.update_weights(weights, version=1)
    with pytest.raises(SamplerError, match="still holds the states of 128 tokens from before the update"):
        vllm_sampler.probe(text)
    monkeypatch.undo()
    vllm_sampler.update_weights(weights, version=2)
    assert len(vllm_sampler.probe(text)) == 1


@pytest.mark.vllm
def test_a_sampler_that_sleeps_wakes_with_the_next_update(
    vllm_sampler: Sampler, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing is given back, but vLLM's engine is as shut as it is on a GPU."""
    vllm_sampler.update_weights(weights, version=0)
    before = vllm_sampler.generate(REQUESTS, SETTINGS)
    monkeypatch.setattr(vllm_sampler, "_sleep_level", 2)
    for version in (1, 2):
        vllm_sampler.sleep()
        with pytest.raises(SamplerError, match="sleeps until the next update"):
            vllm_sampler.generate(REQUESTS, SETTINGS)
        vllm_sampler.update_weights(weights, version)
        assert vllm_sampler.generate(REQUESTS, SETTINGS) == before


@pytest.mark.vllm
def test_a_head_under_a_config_that_ties_it(tmp_path: Path) -> None:
    """vLLM alone would go by the config, and not read it."""
    folder = claim_tied(save_tiny_model(tmp_path / "own_head", tied=False))
    samplers = [
        start_sampler(SamplerSpec(engine, str(folder), "float32", max_model_tokens=256, pad_token_id=0))
        for engine in ("transformers", "vllm")
    ]
    expected, found = (sampler.probe(range(3, 60))[0] for sampler in samplers)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.vllm
def test_a_collected_engine_leaves_the_process_groups_to_others(vllm_sampler: Sampler, tiny_student: Path) -> None:
    """vLLM alone ends them all, the trainer's too."""
    expected = vllm_sampler.generate(REQUESTS, SETTINGS)
    other = start_sampler(SamplerSpec("vllm", str(tiny_student), "float32", max_model_tokens=256, pad_token_id=0))
    gone = weakref.ref(other._llm.llm_engine.engine_core)  # pyright: ignore[reportAttributeAccessIssue]
    other.close()
    gc.collect()
    assert gone() is None and torch.distributed.is_initialized()
    assert vllm_sampler.generate(REQUESTS, SETTINGS) == expected


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["1", "2"])
def test_sleeping_gives_memory_back(tiny_student: Path, level: str) -> None:
    found = json.loads(check(run_python([JOB, tiny_student, level])).stdout.splitlines()[-1])
    assert found["given_back"] > 0.2 and found["difference"] < 1e-5
