"""Parts that can fail on one rank and not on another: then they fail on all, which can save together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gkd.errors import PartError
from gkd.teacher.base import Teacher
from gkd.train.distributed import together
from gkd.train.loop import Metrics, Rollouts
from gkd.types import PromptDraw, Rollout, TeacherScores, WeightStream


class Closable(Rollouts, Protocol):
    def close(self) -> None: ...


class SharedTeacher:
    """Implements `Teacher`."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        return together(lambda: self._teacher.score(rollouts))


class SharedRollouts:
    """Implements the loop's `Rollouts`. An update that fails ends the run after its step, which is done by then:
    `on_failure` is told."""

    def __init__(self, rollouts: Closable, on_failure: Callable[[PartError], None]) -> None:
        self._rollouts, self._on_failure = rollouts, on_failure

    def sample(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        return together(lambda: self._rollouts.sample(draws, step))

    def load_weights(self, weights: WeightStream, version: int) -> Metrics:
        try:
            return self._rollouts.load_weights(weights, version)
        except PartError as error:  # raised on all ranks: weights are gathered and proven together
            self._on_failure(error)
            return {}

    def close(self) -> None:
        self._rollouts.close()
