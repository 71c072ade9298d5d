"""A run that ends after a number of trained tokens and is looked at on its way: what every cell of a comparison is.

It is gkd's `Run` with another monitor: a run of gkd ends after a number of steps, a cell after a number of tokens, as
the lengths of the student's own completions differ between methods. It measures when told to, and writes nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gkd.config import Config, Launch
from gkd.measures.samples import generated_tokens
from gkd.planning.settled import settle_here
from gkd.run_files import RunFiles
from gkd.train import distributed, parts
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.types import Rollout, TokenBatch

LAUNCH = Launch()
Look = dict[str, Any]


def processor_clock() -> float:
    """Seconds. On a CPU those of the processor, of a cell with one thread: other programs beside it do not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


@dataclass
class TokenBudget:
    """Implements the loop's `Monitor`: steps until so many completion tokens were trained on, and what they took."""

    tokens: int
    looks: int
    most_steps: int | None = None
    clock: Callable[[], float] = processor_clock
    trained: int = 0
    sampled: int = 0  # by the student, for training
    seconds_by_step: list[dict[str, float]] = field(default_factory=list)  # of each step its phases, and `all` of it
    _phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def steps(self) -> Iterator[int]:
        while self.trained < self.tokens and self.step_count != self.most_steps:
            self._phases.clear()
            self._started_s = self.clock()
            yield self.step_count

    @property
    def step_count(self) -> int:
        return len(self.seconds_by_step)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, of all steps."""
        total: defaultdict[str, float] = defaultdict(float)
        for step in self.seconds_by_step:
            for name in step.keys() - {"all"}:
                total[name] += step[name]
        return dict(total)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_s = self.clock()
        yield
        self._phases[name] += self.clock() - started_s

    def note(self, text: str) -> None:
        del text

    def first_batch(self, rollouts: Sequence[Rollout], micro_batches: Sequence[TokenBatch]) -> None:
        del rollouts, micro_batches

    def log(self, step: int, *groups: dict[str, float]) -> None:
        del step
        metrics = {name: value for group in groups for name, value in group.items()}
        self.trained += int(metrics["tokens/scored"])
        self.sampled += int(metrics["tokens/sampled"])
        self.seconds_by_step.append({**self._phases, "all": self.clock() - self._started_s})

    def looks_due(self) -> int:
        """How many of the evenly spaced points are behind."""
        return min(self.looks, self.trained * self.looks // max(self.tokens, 1))


class BudgetRun(Run):
    """Built, and not yet trained."""

    def __init__(self, config: Config, budget: TokenBudget) -> None:
        self.budget = budget
        distributed.initialize(LAUNCH)
        config = settle_here(config, LAUNCH.local_rank, LAUNCH.world_size).config
        super().__init__(config, LAUNCH, RunFiles(config.run.folder), ask_placements(config))
        self.build()

    def curve(self, look: Callable[[], Look]) -> list[Look]:
        """Trains; what `look` finds at the start and at the budget's points, with the step and the tokens so far."""
        self._look = look
        self._curve: list[Look] = []
        self._take_look()
        self.loop()
        return self._curve

    def _take_look(self) -> None:
        self.catch_up(self.budget.step_count)
        self._curve.append({"step": self.budget.step_count, "tokens": self.budget.trained, **self._look()})

    def build(self) -> None:
        super().build()
        self._followed = parts.build_heldout(
            self.config,
            self.models,
            self.prompts,
            self.texts,
            teacher=self.teacher,
            student=self.student,
            launch=self.launch,
        )

    def build_monitor(self) -> TokenBudget:
        return self.budget

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        return {"tokens/sampled": float(generated_tokens(rollouts))}

    def evaluate(self, steps_done: int) -> dict[str, float]:
        """Only what a rule of the objective follows."""
        every = self.config.eval.every
        if self._followed is None or not every or steps_done % every:
            return {}
        return self._observed(self._followed.measure().means)

    def save(self, steps_done: int) -> None:
        del steps_done
        if self.budget.looks_due() >= len(self._curve):
            self._take_look()
