"""The algorithm: generalized knowledge distillation on the student's own samples (arXiv 2306.13649).

Everything here is a protocol; `parts/` chooses what stands behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from gkd.teacher.base import Teacher
from gkd.types import PromptDraw, Rollout, TeacherScores, TokenBatch, WeightStream

Metrics = dict[str, float]


class Data(Protocol):
    def batch(self, step: int) -> list[PromptDraw]:
        """This rank's share of the step's global batch: fixed by (seed, step)."""
        ...


class Rollouts(Protocol):
    def sample(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """The lambda mixture: completions of student, teacher or data set, with the weights' version."""
        ...

    def load_weights(self, weights: WeightStream, version: int) -> Metrics:
        """Complete and proven, or WeightSyncError before the next generation."""
        ...


class Student(Protocol):
    def step(self, micro_batches: Sequence[TokenBatch], step: int) -> Metrics:
        """Forward, divergence, backward, finite check, optimizer."""
        ...

    def weights(self) -> WeightStream: ...


class Monitor(Protocol):
    def steps(self) -> Iterator[int]: ...

    def phase(self, name: str) -> AbstractContextManager[None]: ...

    def first_batch(self, rollouts: Sequence[Rollout], micro_batches: Sequence[TokenBatch]) -> None: ...

    def log(self, step: int, *metrics: Metrics) -> object:
        """Of all groups together. Raises ValueError for a name that two of them have with different values."""
        ...


def train_loop(
    *,
    data: Data,
    rollout: Rollouts,
    teacher: Teacher,
    student: Student,
    pack: Callable[[Sequence[Rollout], Sequence[TeacherScores]], list[TokenBatch]],
    measure: Callable[[Sequence[Rollout]], Metrics],
    evaluate: Callable[[int], Metrics],
    monitor: Monitor,
    save: Callable[[int], None],
) -> None:
    """Runs every step that `monitor.steps()` names. All ranks run it together, each on its share of the data."""
    for step in monitor.steps():
        with monitor.phase("sample"):
            rollouts = rollout.sample(data.batch(step), step)

        with monitor.phase("score"):
            scores = teacher.score(rollouts)

        micro_batches = pack(rollouts, scores)
        monitor.first_batch(rollouts, micro_batches)
        stats = student.step(micro_batches, step)

        with monitor.phase("sync"):
            sync = rollout.load_weights(student.weights(), version=step + 1)

        monitor.log(step, stats, sync, measure(rollouts), evaluate(step + 1))
        save(step + 1)
