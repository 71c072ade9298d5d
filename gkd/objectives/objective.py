"""An objective as it is at one step: numbers in the place of schedules.

Legend: N scored tokens of a micro-batch, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.objectives.batch_losses import BatchLoss
from gkd.objectives.divergence import Divergence
from gkd.objectives.row_losses import OfSequences, Part, ReferenceLoss
from gkd.objectives.state_losses import StateLoss
from gkd.objectives.terms import Term
from gkd.objectives.terms.batch import BatchTerm
from gkd.objectives.terms.states import StatesTerm
from gkd.objectives.token_weights import RowWeight
from gkd.schedules import MetricMemory


@dataclass(frozen=True)
class RewardRange:
    """Texts by what they earned; one that nobody judged is in none."""

    start: float
    below: float

    def holds(self, reward: float) -> bool:
        return self.start <= reward < self.below


@dataclass(frozen=True)
class ActiveTerm:
    """A term whose weight is above 0."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    weight: float
    on: frozenset[str] | None  # sources of the texts that it acts on; None is all
    row_weights: tuple[RowWeight, ...] = ()
    sequence_weights: tuple[OfSequences, ...] = ()
    rewarded: RewardRange | None = None

    @property
    def of_sequences(self) -> list[OfSequences]:
        """Everything that needs whole sequences first."""
        return [*self.sequence_weights, *(part.factor for part in self.parts if part.factor is not None)]


@dataclass(frozen=True)
class ActiveStateTerm:
    """A term of states of layers whose weight is above 0."""

    name: str
    loss: StateLoss
    weight: float
    on: frozenset[str] | None
    rewarded: RewardRange | None = None


@dataclass(frozen=True)
class ActiveBatchTerm:
    """A term of the whole global batch whose weight is above 0."""

    name: str
    loss: BatchLoss
    weight: float
    on: frozenset[str] | None
    rewarded: RewardRange | None = None


@dataclass(frozen=True)
class Objective:
    """What a step minimises."""

    terms: tuple[ActiveTerm, ...]  # over the vocabulary
    temperature: float = 1.0  # of both sides' logits, in the terms that compare them
    chunk_bytes: int | None = None  # see `gkd.linear_divergence`
    state_terms: tuple[ActiveStateTerm, ...] = ()
    batch_terms: tuple[ActiveBatchTerm, ...] = ()

    @property
    def of_sequences(self) -> list[OfSequences]:
        return [number for term in self.terms for number in term.of_sequences]

    @property
    def needs_reference(self) -> bool:
        """The initial student's distribution, at this step."""
        return any(isinstance(part.loss, ReferenceLoss) for term in self.terms for part in term.parts)

    def acts(self, sources: Sequence[str], lengths: Sequence[int], rewards: Sequence[float] | None = None) -> Tensor:
        """[K, N] bool on the CPU: which terms act on which tokens of sequences with these sources, lengths and
        rewards."""
        rows = [acts_on(term, sources, lengths, rewards) for term in self.terms]
        return torch.stack(rows) if rows else torch.zeros(0, sum(lengths), dtype=torch.bool)


def acts_on(
    term: ActiveTerm | ActiveStateTerm | ActiveBatchTerm,
    sources: Sequence[str],
    lengths: Sequence[int],
    rewards: Sequence[float] | None,
) -> Tensor:
    """[N] bool on the CPU: which tokens of sequences with these sources, lengths and rewards a term is for."""
    per_sequence = torch.tensor(takes(term, sources, rewards), dtype=torch.bool)
    return per_sequence.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def takes(
    term: ActiveTerm | ActiveStateTerm | ActiveBatchTerm, sources: Sequence[str], rewards: Sequence[float] | None
) -> list[bool]:
    """Which sequences a term is for. `rewards` are NaN where nobody judged; None: nowhere."""
    chosen = [term.on is None or source in term.on for source in sources]
    if term.rewarded is None:
        return chosen
    earned = [math.nan] * len(sources) if rewards is None else rewards
    return [is_chosen and term.rewarded.holds(reward) for is_chosen, reward in zip(chosen, earned, strict=True)]


def objective_at(
    terms: Sequence[Term],
    weights: Mapping[str, float],
    temperature: float,
    step: int,
    memory: MetricMemory,
    chunk_bytes: int | None = None,
) -> Objective:
    """The objective of these terms, `weights` by their labels, at a step; a term of weight 0 is left out."""
    active: list[ActiveTerm | ActiveStateTerm | ActiveBatchTerm] = []
    for term in terms:
        values = {name: memory.value(schedule, step) for name, schedule in term.schedules.items()}
        if (weight := weights[term.label]) != 0.0:
            active.append(_active(term, weight, values, temperature))
    of_rows = tuple(term for term in active if isinstance(term, ActiveTerm))
    of_states = tuple(term for term in active if isinstance(term, ActiveStateTerm))
    of_batch = tuple(term for term in active if isinstance(term, ActiveBatchTerm))
    return Objective(of_rows, temperature, chunk_bytes, of_states, of_batch)


def _active(
    term: Term, weight: float, values: Mapping[str, float], temperature: float
) -> ActiveTerm | ActiveStateTerm | ActiveBatchTerm:
    on = None if term.on is None else frozenset(term.on)
    rewarded = None
    if term.goes_by_reward:
        start = -math.inf if term.reward_from is None else term.reward_from
        rewarded = RewardRange(start, math.inf if term.reward_below is None else term.reward_below)
    if isinstance(term, StatesTerm):
        return ActiveStateTerm(term.label, term.state_loss(values), weight, on, rewarded)
    if isinstance(term, BatchTerm):
        return ActiveBatchTerm(term.label, term.batch_loss(values), weight, on, rewarded)
    return ActiveTerm(
        term.label,
        term.kind,
        term.parts(values, temperature),
        weight,
        on,
        tuple(weight for weight in term.token_weight.values() if isinstance(weight, RowWeight)),
        term.sequence_weights(),
        rewarded,
    )


def divergence_objective(kind: str, beta: float = 0.5) -> Objective:
    """One divergence at temperature 1, on all texts: for measuring."""
    return Objective((ActiveTerm(kind, kind, (Part(Divergence(kind, beta)),), 1.0, None),))
