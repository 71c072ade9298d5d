"""What a term says of a whole global batch: one vector a sequence on each side, and one number of all of them.

Legend: S sequences of the global batch, H_s and H_t widths of the two sides' vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

_SMALLEST = 1e-12  # of a squared distance; two equal vectors have no direction between them, and no gradient


@dataclass(frozen=True)
class BatchLoss:
    """`value_and_gradient(student, teacher)` -> (scalar, [S, H_s]) from vectors [S, H_s] and [S, H_t]."""

    value_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rkd_loss(distance: float, angle: float) -> BatchLoss:
    """distance x `distance_loss` + angle x the mean of `angle_loss` over the vertices.

    One vertex at a time, so that memory goes with S^2 and not with S^3.
    """

    def value_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            own = student.detach().requires_grad_()
            gradient, value = torch.zeros_like(own), own.new_zeros(())
            parts: list[tuple[float, Callable[[], Tensor]]] = []
            if distance and len(own) > 1:
                parts.append((distance, lambda: distance_loss(own, teacher)))
            if angle and len(own) > 2:
                share = angle / len(own)
                parts += [(share, lambda vertex=j: angle_loss(own, teacher, vertex)) for j in range(len(own))]
            for weight, part in parts:
                loss = weight * part()
                value += loss.detach()
                gradient += torch.autograd.grad(loss, own)[0]
        return value, gradient

    return BatchLoss(value_and_gradient)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over pairs of huber(|s_i - s_j| / mean, |t_i - t_j| / mean)."""
    return smooth_l1_loss(_distances(student), _distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor, vertex: int) -> Tensor:
    """The mean over pairs i, k of huber of the cosines of the angles i-vertex-k; all three are different."""
    return smooth_l1_loss(_cosines(student, vertex), _cosines(teacher, vertex))


def _distances(vectors: Tensor) -> Tensor:
    """Of all pairs, by their mean."""
    i, j = torch.triu_indices(len(vectors), len(vectors), offset=1, device=vectors.device)
    lengths = _length(vectors[i] - vectors[j])[:, 0]
    return lengths / lengths.mean()


def _cosines(vectors: Tensor, vertex: int) -> Tensor:
    """Of the angles between the directions from a vertex to all pairs of other vectors."""
    edges = torch.cat([vectors[:vertex], vectors[vertex + 1 :]]) - vectors[vertex]
    directions = edges / _length(edges)
    i, j = torch.triu_indices(len(edges), len(edges), offset=1, device=vectors.device)
    return (directions @ directions.T)[i, j]


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(-1, keepdim=True).clamp(min=_SMALLEST).sqrt()
