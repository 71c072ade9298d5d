"""Confidence intervals by the bootstrap (Efron 1979, Annals of Statistics 7): prompts are drawn again, not tokens.

The tokens of one completion depend on one another; an interval that took them for independent would be too narrow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, *, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of sum(numerators) / sum(denominators), one pair a prompt.

    With a prompt's sum over tokens and its number of tokens that is a mean over tokens; with ones below, over prompts.
    The draws depend on `seed` and the number of prompts alone, so that the models of a table are drawn alike.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(len(above), size=len(above))
        ratios[i] = above[drawn].sum() / below[drawn].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)
