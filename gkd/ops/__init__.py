"""Differentiable losses for a training loop: closed-form gradients behind plain function calls."""

from gkd.ops.divergence import divergence
from gkd.ops.linear_divergence import linear_divergence
from gkd.ops.topk_divergence import topk_divergence
from gkd.ops.vocab_parallel import vocab_parallel_divergence

__all__ = ["divergence", "linear_divergence", "topk_divergence", "vocab_parallel_divergence"]
