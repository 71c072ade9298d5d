"""An objective as it is at one step: numbers in the place of schedules.

Legend: N scored tokens of a micro-batch, K terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence
from gkd.objectives.row_losses import OfSequences, Part
from gkd.objectives.terms import Term
from gkd.objectives.token_weights import RowWeight, SequenceWeight
from gkd.schedules import MetricMemory


@dataclass(frozen=True)
class ActiveTerm:
    """A term whose weight is above 0."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    weight: float
    on: frozenset[str] | None  # sources of the texts that it acts on; None is all
    row_weights: tuple[RowWeight, ...] = ()
    sequence_weights: tuple[SequenceWeight, ...] = ()

    @property
    def of_sequences(self) -> list[OfSequences]:
        """Everything that needs whole sequences first."""
        return [*self.sequence_weights, *(part.factor for part in self.parts if part.factor is not None)]


@dataclass(frozen=True)
class Objective:
    """What a step minimises."""

    terms: tuple[ActiveTerm, ...]
    temperature: float = 1.0  # of both sides' logits, in the terms that compare them
    chunk_bytes: int | None = None  # see `gkd.linear_divergence`

    @property
    def of_sequences(self) -> list[OfSequences]:
        return [number for term in self.terms for number in term.of_sequences]

    def acts(self, sources: Sequence[str], lengths: Sequence[int]) -> Tensor:
        """[K, N] bool on the CPU: which terms act on which tokens of sequences with these sources and lengths."""
        rows = [[term.on is None or source in term.on for source in sources] for term in self.terms]
        per_sequence = torch.tensor(rows, dtype=torch.bool).reshape(len(self.terms), len(sources))
        return per_sequence.repeat_interleave(torch.tensor(lengths, dtype=torch.int64), dim=1)


def objective_at(
    terms: Sequence[Term],
    weights: Mapping[str, float],
    temperature: float,
    step: int,
    memory: MetricMemory,
    chunk_bytes: int | None = None,
) -> Objective:
    """The objective of these terms, `weights` by their labels, at a step; a term of weight 0 is left out."""
    active: list[ActiveTerm] = []
    for term in terms:
        if weights[term.label] == 0.0:
            continue
        values = {name: memory.value(schedule, step) for name, schedule in term.schedules.items()}
        token_weights = term.token_weight.values()
        active.append(
            ActiveTerm(
                term.label,
                term.kind,
                term.parts(values, temperature),
                weights[term.label],
                None if term.on is None else frozenset(term.on),
                tuple(weight for weight in token_weights if isinstance(weight, RowWeight)),
                tuple(weight for weight in token_weights if isinstance(weight, SequenceWeight)),
            )
        )
    return Objective(tuple(active), temperature, chunk_bytes)


def divergence_objective(kind: str, beta: float = 0.5) -> Objective:
    """One divergence at temperature 1, on all texts: for measuring."""
    return Objective((ActiveTerm(kind, kind, (Part(Divergence(kind, beta)),), 1.0, None),))
