"""From a loss per row to the loss: reductions, row weights, and the factor that each row's gradient gets.

Legend: `...` the dimensions of the rows, N their number. A row of weight 0 is ignored: its loss counts as 0 and its
gradient is exactly 0, whatever the row holds (NaN in padding included).
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError

REDUCTIONS = ("none", "sum", "mean")


def check_reduction(reduction: str) -> None:
    """Raises ConfigError unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        nearest = difflib.get_close_matches(str(reduction), REDUCTIONS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"reduction: unknown {reduction!r}; did you mean {nearest!r}? Known: {', '.join(REDUCTIONS)}")


def check_weights(weights: Tensor | None, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises InputError unless `weights` is None or a real tensor of one weight a row."""
    if weights is None:
        return
    if tuple(weights.shape) != tuple(shape):
        raise InputError(f"weights must have one entry a row, shape {list(shape)}, not {list(weights.shape)}")
    if weights.is_complex():
        raise InputError(f"weights must be real numbers, not {weights.dtype}")


def mask_rows(rows: Tensor, weights: Tensor | None) -> Tensor:
    """`rows` [..., H] with those of weight 0 replaced by zeros, so that nothing in them can leak."""
    if weights is None:
        return rows
    return torch.where((weights != 0).unsqueeze(-1), rows, 0.0)


def weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    """weights * values, [...]; exactly 0 where the weight is, whatever the value."""
    if weights is None:
        return values
    return torch.where(weights != 0, values * weights.to(values.dtype), 0.0)


def reduce_rows(values: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The reduced loss: values [...] -> [...] for "none", a scalar for "sum" and "mean".

    "none" is w d, "sum" is sum w d, "mean" is sum w d / sum w (0 where the weights sum to 0, and for no rows).
    """
    weighted = weigh(values, weights)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total if reduction == "sum" else _divide_or_zero(total, _total_weight(values, weights))


def row_factors(like: Tensor, weights: Tensor | None, reduction: str) -> Tensor | None:
    """d loss / d value of each row, [...] in `like`'s dtype; None means 1. For "none" before the upstream gradient."""
    if reduction != "mean":
        return None if weights is None else weights.to(like.dtype)
    ones = torch.ones_like(like) if weights is None else weights.to(like.dtype)
    return _divide_or_zero(ones, _total_weight(like, weights))


def _total_weight(like: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.full((), float(like.numel()), dtype=like.dtype, device=like.device)
    return weights.to(like.dtype).sum()


def _divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))
