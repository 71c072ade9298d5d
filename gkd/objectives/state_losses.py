"""What a term says of states of layers: a distance between two vectors, token by token.

Legend: M tokens, H the teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-12  # of a squared length that is divided by


@dataclass(frozen=True)
class StateLoss:
    """`value(student, teacher)` -> [M], differentiable, from states [M, H] each, in float32 or float64."""

    value: Callable[[Tensor, Tensor], Tensor]


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / H."""
    return (student - teacher).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - s.t / (|s| |t|). Of two equal directions it is 0 to rounding, and so is its gradient."""
    return 1 - (_direction(student) * _direction(teacher)).sum(-1)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2: the share of the teacher's energy that is missed, whatever the states' scale."""
    energy = teacher.square().sum(-1).clamp(min=_SMALLEST)
    return (student - teacher).square().sum(-1) / energy


def _direction(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().sum(-1, keepdim=True).clamp(min=_SMALLEST))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "normalized_mse": normalized_mse,
}
