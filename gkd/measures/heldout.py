"""Held-out divergence: how far the student is from the teacher on text that the teacher wrote and nobody trained on.

Legend: N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gkd.objectives.objective import Objective, divergence_objective
from gkd.seeding import derive_seed
from gkd.teacher.base import Teacher
from gkd.types import AlignedScores, Completion, Prompt, PromptDraw, Rollout, SampleRequest, TeacherScores, TokenBatch

# JSD(1/2) is the loss of the pass, both KLs are its by-products: one pass measures all three.
COMPARED = divergence_objective("jsd", beta=0.5)
DIVERGENCES: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd")
TOPK_DIVERGENCES = ("topk_forward_kl", "topk_reverse_kl", "topk_jsd")  # where a teacher gives its top k only
ALIGNED_DIVERGENCES = ("aligned_forward_kl", "aligned_reverse_kl", "aligned_jsd")  # with another tokenizer
_MOST_BUCKETS = 64  # of positions: as many as a picture can show

Pack = Callable[[Sequence[Rollout], Sequence[TeacherScores]], list[TokenBatch]]


class MeasuresDivergence(Protocol):
    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        """For each micro-batch {name: [N]}: the objective's terms by name, beside them both KLs and more.

        From a teacher's top k they are `topk_jsd`, `topk_forward_kl` and so on.
        """
        ...


@dataclass(frozen=True)
class HeldoutFigures:
    """Mean divergences a token, in nats: over everything, and by position in the completion.

    Bucket i holds the tokens i * bucket_tokens + 1 to (i + 1) * bucket_tokens of the completions. What was measured
    from a teacher's top k, or with another tokenizer than the student's, has means of its own, `heldout/topk_...` and
    `heldout/aligned_...`, and no part in the positions.
    """

    means: dict[str, float]  # by metric: heldout/forward_kl and so on
    bucket_tokens: int
    tokens: list[int]  # measured in each bucket
    by_position: dict[str, list[float]]  # forward_kl and so on: the mean of each bucket

    def as_record(self) -> dict[str, Any]:
        """What a line of a heldout_positions.jsonl holds beside its step."""
        return {"bucket_tokens": self.bucket_tokens, "tokens": self.tokens, **self.by_position}


def heldout_requests(prompts: Sequence[Prompt], seed: int) -> list[SampleRequest]:
    """What the teacher is asked to complete, as it reads the prompts."""
    return [SampleRequest(p.read_by_teacher, derive_seed(seed, "heldout", p.index)) for p in prompts]


def heldout_rollouts(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Rollout]:
    return [
        Rollout(PromptDraw(prompt, 0), "teacher", completion.token_ids)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


class HeldoutEvaluation:
    """Mean divergences a token between teacher and student over the teacher's own completions, in nats.

    Ranks share the rollouts. All take part in every forward, so a rank with fewer rows gets empty ones.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        *,
        teacher: Teacher,
        student: MeasuresDivergence,
        pack: Pack,
        rank: int,
        world_size: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        bucket_tokens: int | None = None,
    ) -> None:
        """`bucket_tokens` None: as few as leave no more buckets than a picture can show."""
        padding = [Rollout(rollouts[0].draw, "teacher", ())] * (-len(rollouts) % world_size)
        self._rollouts = [*rollouts, *padding][rank::world_size]
        self._teacher = teacher
        self._student = student
        self._pack = pack
        self._sum_over_ranks = sum_over_ranks
        longest = max(len(rollout.completion_ids) for rollout in rollouts)
        self._bucket_tokens = bucket_tokens or max(1, -(-longest // _MOST_BUCKETS))
        self._buckets = max(1, -(-longest // self._bucket_tokens))

    def measure(self) -> HeldoutFigures:
        """Collective."""
        micro_batches = self._pack(self._rollouts, self._teacher.score(self._rollouts))
        measured = self._student.token_measures(micro_batches, COMPARED)
        kinds = (DIVERGENCES, TOPK_DIVERGENCES, ALIGNED_DIVERGENCES)
        by_kind = [self._sum_over_ranks(self._bucket_sums(micro_batches, measured, columns)).cpu() for columns in kinds]
        sums = by_kind[0]
        tokens = sums[0]
        by_position = dict(zip(DIVERGENCES, (sums[1:] / tokens.clamp(min=1.0)).tolist(), strict=True))
        return HeldoutFigures(
            means={name: mean for found in map(_means, by_kind, kinds) for name, mean in found.items()},
            bucket_tokens=self._bucket_tokens,
            tokens=[round(count) for count in tokens.tolist()],
            by_position=by_position,
        )

    def _bucket_sums(
        self,
        micro_batches: Sequence[TokenBatch],
        measured: Sequence[Mapping[str, torch.Tensor]],
        columns: Sequence[str],
    ) -> torch.Tensor:
        """[1 + len(columns), buckets] float64: tokens, then sums of each divergence, where they were measured; this
        rank's."""
        device = next(iter(measured[0].values())).device
        sums = torch.zeros(1 + len(columns), self._buckets, dtype=torch.float64, device=device)
        for batch, values in zip(micro_batches, measured, strict=True):
            if not values.keys() >= set(columns):
                continue
            bucket = (completion_positions(batch) // self._bucket_tokens).to(device)  # [N]
            rows = [values[name] for name in columns]
            sums.index_add_(1, bucket, torch.stack([_counted(batch).to(rows[0]), *rows]).double())
        return sums


def _means(sums: torch.Tensor, columns: Iterable[str]) -> dict[str, float]:
    """By metric, from `_bucket_sums`; none where nothing was measured."""
    tokens, *totals = sums.sum(1).tolist()
    return {f"heldout/{name}": total / tokens for name, total in zip(columns, totals, strict=True) if tokens}


def _counted(batch: TokenBatch) -> torch.Tensor:
    """[N] bool: the tokens that something was measured of."""
    if isinstance(batch.teacher, AlignedScores):
        return batch.teacher.student_spans >= 0
    return torch.ones(batch.scored_tokens, dtype=torch.bool)


def completion_positions(batch: TokenBatch) -> torch.Tensor:
    """Of each scored token its place in its completion, from 0: [N] int64. A sequence's tokens stand together."""
    lengths = torch.bincount(batch.sequence_index, minlength=len(batch.sample_ids))
    starts = lengths.cumsum(0) - lengths  # of each sequence, in N
    return torch.arange(batch.scored_tokens) - starts[batch.sequence_index]
