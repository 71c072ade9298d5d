"""What a term says of a pair of states of layers: distances token by token, and relations between tokens.

Legend: M tokens, H the teacher's width, m tokens of a sequence, n of them whose values are asked for, R relation heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from gkd.types import WhichTokens

_SMALLEST = 1e-12  # of a squared length that is divided by


class SequenceLengths(NamedTuple):
    """Of each sequence of a micro-batch, prompt and completion; 0 where nothing of one is scored."""

    all: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True)
class StateLoss:
    """`value(student, teacher, lengths)` -> [M], differentiable, in float32 or float64, of these tokens.

    Of the states it is told what `StatePair` says, in the order of the sequences.
    """

    value: Callable[[Tensor, Tensor, SequenceLengths], Tensor]
    tokens: WhichTokens


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / H, [M] from [M, H]."""
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


def distance_loss(name: str, tokens: WhichTokens) -> StateLoss:
    """Of DISTANCES."""
    distance = DISTANCES[name]
    return StateLoss(lambda student, teacher, _: distance(student, teacher), tokens)


def relation_loss(heads: int, tokens: WhichTokens) -> StateLoss:
    """KL of `relations` from states of all tokens, whatever the widths."""

    def value(student: Tensor, teacher: Tensor, lengths: SequenceLengths) -> Tensor:
        values = [student.new_zeros(0)]
        sides = (_sequences(student, lengths.all), _sequences(teacher, lengths.all))
        for own, other, scored in zip(*sides, lengths.scored, strict=True):
            if scored:
                rows = slice(len(own) - 1 - scored, -1) if tokens == "scored" else slice(None)
                values.append(relation_kl(own, other, heads, rows))
        return torch.cat(values)

    return StateLoss(value, tokens)


def _sequences(states: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", states.split(list(lengths)))  # pyright: ignore[reportUnknownMemberType]


def relation_kl(student: Tensor, teacher: Tensor, heads: int, rows: slice) -> Tensor:
    """KL(teacher || student) of the relations of a sequence's positions `rows`, mean over heads: [n] from [m, H]."""
    own, other = log_relations(student, heads, rows), log_relations(teacher, heads, rows)
    seen = _seen(len(student), rows, student.device)
    return torch.where(seen, other.exp() * (other - own), 0.0).sum(-1).mean(0)


def log_relations(states: Tensor, heads: int, rows: slice) -> Tensor:
    """log softmax(X X^T / sqrt(d)) [R, n, m] of a sequence's states [m, H], d = H / R, over the positions up to a row's
    own; large and finite beyond."""
    vectors = states.reshape(len(states), heads, states.shape[1] // heads).transpose(0, 1)  # [R, m, d]
    scores = vectors[:, rows] @ vectors.mT * vectors.shape[-1] ** -0.5
    unseen = ~_seen(len(states), rows, states.device)
    return scores.masked_fill(unseen, torch.finfo(scores.dtype).min).log_softmax(-1)


def _seen(length: int, rows: slice, device: torch.device) -> Tensor:
    """[n, m] bool: positions up to the row's own."""
    positions = torch.arange(length, device=device)
    return positions <= positions[rows, None]
