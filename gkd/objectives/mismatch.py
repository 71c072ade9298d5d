"""How far the sampler's distribution is from the trainer's, and weights that make up for it.

Two engines round differently, and a sampler may hold older weights. Both show in the ratio r = p_trainer / p_sampler of
the sampled tokens. Both are the models' own probabilities: temperature and truncation of the sampling are left out.

Legend: N scored tokens, S sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ImportanceLevel = Literal["token", "sequence"]


class MismatchSums(NamedTuple):
    """Over tokens that the sampler drew; scalars in float64, which add up over micro-batches and ranks."""

    tokens: Tensor
    k3: Tensor  # sum of r - 1 - log r
    ratio: Tensor  # sum of r
    ratio_squared: Tensor


def log_ratios(trainer_logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """log r [N] in float64; 0 where `sampler_logprobs` is NaN: the token was not sampled from the student."""
    difference = trainer_logprobs.double() - sampler_logprobs.double()
    return torch.where(sampler_logprobs.isnan(), 0.0, difference)


def mismatch_sums(log_ratio: Tensor, sampled: Tensor) -> MismatchSums:
    """log_ratio [N], sampled [N] bool. k3 estimates KL(sampler || trainer) without bias and is never negative
    (Schulman 2020, "Approximating KL divergence")."""
    log_ratio = torch.where(sampled, log_ratio, 0.0)
    ratio = log_ratio.exp() * sampled
    k3 = torch.expm1(log_ratio) - log_ratio
    return MismatchSums(sampled.sum().double(), k3.sum(), ratio.sum(), ratio.square().sum())


def mismatch_means(tokens: float, k3: float, ratio: float, ratio_squared: float) -> dict[str, float]:
    """{k3, effective_sample_share} from MismatchSums; the latter is (sum r)^2 / (N sum r^2), 1 where all ratios are
    equal (Kong 1992). Empty where nothing was sampled.
    """
    if tokens == 0:
        return {}
    return {"k3": k3 / tokens, "effective_sample_share": ratio**2 / max(tokens * ratio_squared, 1e-300)}


def importance_weights(
    log_ratio: Tensor, sequence_index: Tensor, sequences: int, level: ImportanceLevel, cap: float
) -> Tensor:
    """Truncated importance weights min(r, cap) [N] in float32 (Ionides 2008), 1 for tokens that were not sampled.

    "token": each token's own ratio; "sequence": the product of its sequence's, for all of its tokens.
    """
    if level == "sequence":
        total = log_ratio.new_zeros(sequences).index_add_(0, sequence_index, log_ratio)  # [S]
        log_ratio = total[sequence_index]
    return log_ratio.exp().clamp(max=cap).float()
