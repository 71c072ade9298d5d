"""The terms of an objective that compare states of layers, with what they learn beside the student.

Legend: B rows, T positions, M tokens that a term looks at, H width of states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from gkd.models.layer_states import Source
from gkd.objectives.objective import ActiveStateTerm, Objective, acts_on
from gkd.objectives.state_losses import SequenceLengths
from gkd.seeding import derive_seed
from gkd.types import HiddenScores, StatePair, StatePairs, TokenBatch


class StateSums(NamedTuple):
    """Of one micro-batch."""

    loss: torch.Tensor  # scalar: sum over terms and tokens of weight x value, differentiable
    values: torch.Tensor  # [2, terms] float64: sum of each term's values before any weight, and of how many tokens


class StateTerms(nn.Module):
    """Projectors from the student's width to the teacher's are parameters of it, and no part of the student."""

    def __init__(self, pairs: StatePairs, seed: int) -> None:
        """`seed` alone decides where the projectors begin."""
        super().__init__()
        self._pairs = pairs
        self._numbers: dict[tuple[str, int], int] = {}  # of the projectors, by term and pair
        self.projectors = nn.ModuleList()
        for name, own in pairs.items():
            for index, pair in enumerate(own):
                if pair.is_projected:
                    self._numbers[name, index] = len(self.projectors)
                    self.projectors.append(_projector(pair, derive_seed(seed, "projector", name, index)))

    def sources(self, objective: Objective) -> set[Source]:
        """What the objective needs of the student's layers."""
        return {pair.student.source for term in objective.state_terms for pair in self._pairs[term.name]}

    def forward(
        self, states: Mapping[Source, torch.Tensor], last: torch.Tensor, batch: TokenBatch, objective: Objective
    ) -> StateSums:
        """`states` [B, T, H] are those of `sources`, `last` those that the output head reads."""
        losses = [self._unused(last, objective)]
        sums: list[torch.Tensor] = []
        for term in objective.state_terms:
            view = batch.view(term.loss.tokens)
            values = self._values(term, states, batch)  # [M]
            acts = acts_on(term, batch.sources, view.counts, batch.sequence_rewards).to(values.device)
            values = torch.where(acts, values, 0.0)
            losses.append(term.weight * (view.weights * values).sum())
            sums.append(torch.stack([values.detach().double().sum(), acts.double().sum()]))
        return StateSums(
            torch.stack(losses).sum(), torch.stack(sums, 1) if sums else last.new_zeros(2, 0, dtype=torch.float64)
        )

    def _values(self, term: ActiveStateTerm, states: Mapping[Source, torch.Tensor], batch: TokenBatch) -> torch.Tensor:
        """[M], the mean over the term's pairs."""
        assert isinstance(batch.teacher, HiddenScores)
        lengths = SequenceLengths(batch.view("all").counts, batch.completion_lengths)
        values: list[torch.Tensor] = []
        for index, pair in enumerate(self._pairs[term.name]):
            student = states[pair.student.source].flatten(0, 1)[batch.view(pair.student.tokens).index]  # [M, H]
            if (number := self._numbers.get((term.name, index))) is not None:
                student = self.projectors[number](student)
            values.append(_in_float32(term, student, batch.teacher.layer_states[pair.teacher], lengths))
        return torch.stack(values).mean(0)

    def _unused(self, last: torch.Tensor, objective: Objective) -> torch.Tensor:
        """0, from every projector whose term is not active: of one without a gradient ZeRO-3 takes the last again."""
        active = {term.name for term in objective.state_terms}
        zero = last.new_zeros((), dtype=torch.float32)
        for (name, _), number in self._numbers.items():
            if name not in active:
                zero = zero + self.projectors[number](last[:0]).sum().float()
        return zero


def _in_float32(
    term: ActiveStateTerm, student: torch.Tensor, teacher: torch.Tensor, lengths: SequenceLengths
) -> torch.Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return term.loss.value(student.float(), teacher.float(), lengths)


def _projector(pair: StatePair, seed: int) -> nn.Linear:
    """Keeps lengths on average: entries of variance 1 / student width."""
    projector = nn.Linear(pair.student_width, pair.teacher_width, bias=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(projector.weight, std=pair.student_width**-0.5, generator=generator)
    return projector
