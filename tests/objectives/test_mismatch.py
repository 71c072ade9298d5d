"""Mismatch of sampler and trainer: estimates held to exact sums over a small vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from gkd.objectives.mismatch import importance_weights, log_ratios, mismatch_means, mismatch_sums


def means(log_ratio: torch.Tensor, sampled: torch.Tensor) -> dict[str, float]:
    return mismatch_means(*(float(value) for value in mismatch_sums(log_ratio, sampled)))


def test_k3_and_ratio_are_unbiased() -> None:
    """Weighted by the sampler's probabilities, k3 sums to the KL and the ratio to 1, exactly."""
    generator = torch.Generator().manual_seed(0)
    sampler, trainer = torch.randn(2, 9, generator=generator, dtype=torch.float64).softmax(-1)
    log_ratio = trainer.log() - sampler.log()
    k3, ratio = torch.zeros(2, dtype=torch.float64)
    for probability, one in zip(sampler, log_ratio, strict=True):
        sums = mismatch_sums(one[None], torch.ones(1, dtype=torch.bool))
        k3, ratio = k3 + probability * sums.k3, ratio + probability * sums.ratio
        assert sums.k3 >= 0
    torch.testing.assert_close(k3, (sampler * (sampler / trainer).log()).sum())
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_small_differences_keep_their_digits() -> None:
    log_ratio = torch.full((4,), 1e-7, dtype=torch.float64)
    assert means(log_ratio, torch.ones(4, dtype=torch.bool))["k3"] == pytest.approx(5e-15, rel=1e-2)


def test_only_sampled_tokens_count() -> None:
    sampler_logprobs = torch.tensor([-1.0, math.nan, -2.0])
    log_ratio = log_ratios(torch.tensor([-1.5, -9.0, -1.0]), sampler_logprobs)
    assert log_ratio.tolist() == [-0.5, 0.0, 1.0]
    found = means(log_ratio, ~sampler_logprobs.isnan())
    ratios = [math.exp(-0.5), math.e]
    assert found["k3"] == pytest.approx((ratios[0] - 1 + 0.5 + ratios[1] - 2) / 2)
    assert found["effective_sample_share"] == pytest.approx(sum(ratios) ** 2 / (2 * sum(r * r for r in ratios)))
    assert means(log_ratio, torch.zeros(3, dtype=torch.bool)) == {}


def test_equal_engines_give_zero_and_one() -> None:
    assert means(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)) == {
        "k3": 0.0,
        "effective_sample_share": 1.0,
    }


def test_weights_of_tokens_and_sequences() -> None:
    log_ratio = torch.tensor([0.1, 0.2, 0.0, -0.4, 3.0], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 2, 2])
    by_token = importance_weights(log_ratio, sequence, 4, "token", 2.0)
    torch.testing.assert_close(by_token, torch.tensor([math.exp(0.1), math.exp(0.2), 1.0, math.exp(-0.4), 2.0]))
    by_sequence = importance_weights(log_ratio, sequence, 4, "sequence", 20.0)
    torch.testing.assert_close(by_sequence, torch.tensor([math.exp(0.3)] * 2 + [1.0] + [math.exp(2.6)] * 2))
