"""The terms of an objective that compare the sequences of the global batch with one another.

Legend: N scored tokens and S sequences of a micro-batch, H width of states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gkd.objectives.objective import ActiveBatchTerm, Objective, takes
from gkd.train.distributed import all_ranks_rows
from gkd.types import HiddenScores, TokenBatch


@dataclass(frozen=True)
class BatchGradients:
    """Of the global batch; the same numbers on all ranks."""

    loss: float  # sum over terms of weight x value
    values: dict[str, float]  # of each term, before its weight
    gradients: list[torch.Tensor]  # of the loss, by the vectors [S, H] of each of this rank's micro-batches


def batch_gradients(
    vectors_of: Callable[[int, TokenBatch], torch.Tensor], micro_batches: Sequence[TokenBatch], objective: Objective
) -> BatchGradients:
    """`vectors_of(index, micro_batch)` gives the student's vectors [S, H]. Collective."""
    with torch.no_grad():
        own = [vectors_of(index, batch).float() for index, batch in enumerate(micro_batches)]
    sizes, device = [len(vectors) for vectors in own], own[0].device
    student, here = all_ranks_rows(torch.cat(own))
    teacher, _ = all_ranks_rows(torch.cat([_teacher_vectors(batch, device) for batch in micro_batches]))
    total, values, gradient = 0.0, dict[str, float](), torch.zeros_like(student)
    for term in objective.batch_terms:
        chosen, _ = all_ranks_rows(torch.cat([_has_vector(term, batch) for batch in micro_batches]).to(device))
        value, own_gradient = term.loss.value_and_gradient(student[chosen], teacher[chosen])
        values[term.name] = value.item()
        total += term.weight * values[term.name]
        gradient[chosen] += term.weight * own_gradient
    return BatchGradients(total, values, list(gradient[here].split(sizes)))


def sequence_vectors(rows: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """[S, H] float32: the mean of each sequence's rows of [N, H]; 0 where it has none."""
    index = batch.sequence_index.to(rows.device)
    sums = torch.zeros(len(batch.sample_ids), rows.shape[1], dtype=torch.float32, device=rows.device)
    lengths = torch.tensor(batch.completion_lengths, dtype=torch.float32).clamp(min=1.0).to(rows.device)
    return sums.index_add(0, index, rows.float()) / lengths[:, None]


def _teacher_vectors(batch: TokenBatch, device: torch.device) -> torch.Tensor:
    assert isinstance(batch.teacher, HiddenScores)
    return sequence_vectors(batch.teacher.states.to(device), batch)


def _has_vector(term: ActiveBatchTerm, batch: TokenBatch) -> torch.Tensor:
    """[S] bool."""
    chosen = takes(term, batch.sources, batch.sequence_rewards)
    acts = [length > 0 and is_for for is_for, length in zip(chosen, batch.completion_lengths, strict=True)]
    return torch.tensor(acts, dtype=torch.bool)
