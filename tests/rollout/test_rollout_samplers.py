"""What both samplers promise, held against a plain forward of the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd.rollout.base import Sampler
from gkd.types import SampleRequest, SamplingSettings

END = 2
PROMPTS = [(1, 87, 85, 71), (1, 90), (1, 60, 61, 62, 63, 64, 65), (1, 74, 75, 76)]
SETTINGS = SamplingSettings(max_new_tokens=12, stop_token_ids=(END,))


@pytest.fixture(scope="module")
def model(tiny_student: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def own_weights(sampler: Sampler, model: PreTrainedModel) -> None:
    sampler.update_weights(((name, p.detach()) for name, p in model.named_parameters()), version=0)


def requests(first_seed: int = 0) -> list[SampleRequest]:
    return [SampleRequest(prompt, first_seed + i) for i, prompt in enumerate(PROMPTS)]


def next_logits(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_logprobs_are_the_models_own(sampler: Sampler, model: PreTrainedModel) -> None:
    """Also with temperature and truncation on: what comes back is the untempered, untruncated distribution."""
    settings = SamplingSettings(12, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(END,))
    for request, completion in zip(requests(), sampler.generate(requests(), settings), strict=True):
        logprobs = next_logits(model, request.prompt_ids + completion.token_ids).log_softmax(-1)
        start = len(request.prompt_ids) - 1
        expected = [logprobs[start + i, token].item() for i, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_seed_decides_the_completion_alone(sampler: Sampler) -> None:
    whole = sampler.generate(requests(), SETTINGS)
    assert sampler.generate(requests(), SETTINGS) == whole
    alone = sampler.generate(requests()[2:3], SETTINGS)[0]
    assert alone.token_ids == whole[2].token_ids, "the rest of the batch does not matter"
    assert [c.token_ids for c in sampler.generate(requests(100), SETTINGS)] != [c.token_ids for c in whole]


def test_greedy_is_argmax(sampler: Sampler, model: PreTrainedModel) -> None:
    for request, completion in zip(
        requests(), sampler.generate(requests(), SamplingSettings(6, temperature=0.0)), strict=True
    ):
        choice = next_logits(model, request.prompt_ids + completion.token_ids).argmax(-1).tolist()
        assert list(completion.token_ids) == choice[len(request.prompt_ids) - 1 : -1]


def test_top_k_bounds_the_choice(sampler: Sampler, model: PreTrainedModel) -> None:
    asked = [SampleRequest(PROMPTS[0], seed) for seed in range(60)]
    top = set(next_logits(model, PROMPTS[0])[-1].topk(3).indices.tolist())
    drawn = {c.token_ids[0] for c in sampler.generate(asked, SamplingSettings(1, top_k=3))}
    assert drawn == top


def test_sampling_follows_the_distribution(sampler: Sampler, model: PreTrainedModel) -> None:
    count = 1500
    asked = [SampleRequest(PROMPTS[1], seed) for seed in range(count)]
    probabilities = next_logits(model, PROMPTS[1])[-1].softmax(-1)
    drawn = torch.bincount(
        torch.tensor([c.token_ids[0] for c in sampler.generate(asked, SamplingSettings(1))]), minlength=259
    )
    for token in probabilities.topk(4).indices.tolist():
        p = probabilities[token].item()
        assert abs(drawn[token].item() / count - p) < 4.5 * (p * (1 - p) / count) ** 0.5


def test_stop_tokens_end_and_are_kept(sampler: Sampler) -> None:
    free = sampler.generate(requests(), SamplingSettings(12))
    assert all(len(c.token_ids) == 12 and c.finish_reason == "length" for c in free), "no stop ids: full length"
    stop = free[0].token_ids[4]
    cut = sampler.generate(requests()[:1], SamplingSettings(12, stop_token_ids=(END, stop)))[0]
    first = free[0].token_ids.index(stop)
    assert cut.token_ids == free[0].token_ids[: first + 1]
    assert cut.finish_reason == "stop" and len(cut.logprobs) == first + 1


def test_a_request_may_ask_for_fewer_tokens(sampler: Sampler) -> None:
    whole = sampler.generate(requests(), SETTINGS)
    limits = (1, 5, None, 100)
    asked = [replace(request, most_tokens=limit) for request, limit in zip(requests(), limits, strict=False)]
    for completion, found, limit in zip(whole, sampler.generate(asked, SETTINGS), limits, strict=False):
        assert found.token_ids == completion.token_ids[:limit]
        assert found.logprobs == pytest.approx(completion.logprobs[:limit], abs=1e-4)
        assert found.finish_reason == (
            "length" if found.token_ids != completion.token_ids else completion.finish_reason
        )


def test_new_weights_reach_cached_prefixes(sampler: Sampler, model: PreTrainedModel) -> None:
    """A prompt longer than a block of the prefix cache (128 tokens) is scored by the new weights, not the cached."""
    long = SampleRequest(tuple(3 + (7 * i) % 250 for i in range(200)), 1)
    before = sampler.generate([long], SamplingSettings(4))[0]
    changed = {name: p.detach() * (1.3 if "mlp" in name else 1.0) for name, p in model.named_parameters()}
    sampler.update_weights(changed.items(), version=1)
    after = sampler.generate([long], SamplingSettings(4))[0]
    other = AutoModelForCausalLM.from_config(model.config).eval()
    other.load_state_dict(changed, strict=False)
    other.tie_weights()
    logprobs = next_logits(other, long.prompt_ids + after.token_ids).log_softmax(-1)
    expected = [logprobs[199 + i, token].item() for i, token in enumerate(after.token_ids)]
    assert after.logprobs == pytest.approx(expected, abs=1e-4)
    assert after != before


def test_a_probe_is_a_plain_forward(sampler: Sampler, model: PreTrainedModel) -> None:
    text = tuple(3 + (7 * i) % 250 for i in range(200))
    logprobs = next_logits(model, text)[:-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    assert sampler.probe(text) == [pytest.approx(expected, abs=1e-4)]


def test_nothing_asked_nothing_answered(sampler: Sampler) -> None:
    assert sampler.generate([], SETTINGS) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_id_that_the_other_side_lacks_is_never_drawn(
    sampler: Sampler, model: PreTrainedModel, temperature: float
) -> None:
    """Log-probabilities stay those of the whole vocabulary: what is left out is left out of the draw alone."""
    settings = SamplingSettings(12, temperature=temperature, shared_vocab=90)
    free = sampler.generate(requests(), SamplingSettings(12, temperature=temperature))
    assert max(max(completion.token_ids) for completion in free) >= 90
    for request, completion in zip(requests(), sampler.generate(requests(), settings), strict=True):
        assert max(completion.token_ids) < 90
        expected = next_logits(model, request.prompt_ids)[-1].log_softmax(-1)[completion.token_ids[0]].item()
        assert completion.logprobs[0] == pytest.approx(expected, abs=1e-3)
