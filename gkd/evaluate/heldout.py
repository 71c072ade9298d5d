"""Held-out divergence: how far the student is from the teacher on text that the teacher wrote and nobody trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gkd.config import ObjectiveConfig
from gkd.seeding import derive_seed
from gkd.teacher.base import Teacher
from gkd.types import Completion, OutputHead, Prompt, PromptDraw, Rollout, SampleRequest, TeacherScores, TokenBatch

# JSD(1/2) is the loss of the pass, both KLs are its by-products: one pass measures all three.
_OBJECTIVE = ObjectiveConfig(kind="jsd", beta=0.5)  # pyright: ignore[reportCallIssue]
_NAMES = ("forward_kl", "reverse_kl", "jsd")


class MeasuresDivergence(Protocol):
    def divergences(
        self, micro_batches: Sequence[TokenBatch], teacher_head: OutputHead, objective: ObjectiveConfig
    ) -> dict[str, float]: ...


def heldout_requests(prompts: Sequence[Prompt], seed: int) -> list[SampleRequest]:
    """What the teacher is asked to complete."""
    return [SampleRequest(p.token_ids, derive_seed(seed, "heldout", p.index)) for p in prompts]


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
        pack: Callable[[Sequence[Rollout], TeacherScores], list[TokenBatch]],
        rank: int,
        world_size: int,
    ) -> None:
        padding = [Rollout(rollouts[0].draw, "teacher", ())] * (-len(rollouts) % world_size)
        self._rollouts = [*rollouts, *padding][rank::world_size]
        self._teacher = teacher
        self._student = student
        self._pack = pack

    def measure(self) -> dict[str, float]:
        """`heldout/forward_kl`, `heldout/reverse_kl` and `heldout/jsd`."""
        scores = self._teacher.score(self._rollouts)
        means = self._student.divergences(self._pack(self._rollouts, scores), scores.head, _OBJECTIVE)
        return {f"heldout/{name}": means[name] for name in _NAMES}
