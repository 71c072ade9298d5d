"""Intervals: they hold what they claim to, over prompts and not over tokens."""

from __future__ import annotations

import numpy as np
import pytest

from gkd.evaluate.bootstrap import ratio_interval

RESAMPLES = 400


def draw(prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over tokens and token counts of prompts whose tokens share most of their noise; the true mean is 2."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 40, size=prompts)
    own = generator.normal(2.0, 1.0, size=prompts)  # of a prompt: all its tokens move together
    noise = generator.normal(0.0, 1.0, size=prompts) * np.sqrt(tokens) * 0.3
    return own * tokens + noise, tokens.astype(float)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(300):
        low, high = ratio_interval(*draw(40, seed), resamples=RESAMPLES, seed=seed)
        covered += low <= 2.0 <= high
    # 95 % of 300 is 285; the percentile bootstrap of 40 prompts falls a little short of it
    assert 270 <= covered <= 297


def test_an_interval_over_tokens_would_be_too_narrow() -> None:
    sums, tokens = draw(60, 1)
    low, high = ratio_interval(sums, tokens, resamples=RESAMPLES, seed=0)
    each_token = np.repeat(sums / tokens, tokens.astype(int))
    token_low, token_high = ratio_interval(each_token, np.ones_like(each_token), resamples=RESAMPLES, seed=0)
    assert token_high - token_low < 0.5 * (high - low)


def test_it_holds_the_mean_and_shrinks_with_more_prompts() -> None:
    widths = []
    for prompts in (25, 100, 400):
        sums, tokens = draw(prompts, 3)
        low, high = ratio_interval(sums, tokens, resamples=RESAMPLES, seed=0)
        assert low < sums.sum() / tokens.sum() < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.35)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.35)


def test_the_seed_decides() -> None:
    sums, tokens = draw(20, 5)
    first = ratio_interval(sums, tokens, resamples=RESAMPLES, seed=1)
    assert first == ratio_interval(sums, tokens, resamples=RESAMPLES, seed=1)
    assert first != ratio_interval(sums, tokens, resamples=RESAMPLES, seed=2)
