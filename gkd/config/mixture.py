"""mixture: whose completions a step trains on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from pydantic import ConfigDict, Field, model_validator

from gkd.registry import SOURCES
from gkd.schedules import FractionSchedule, Ramp, largest, value_at
from gkd.schema import Section

_TOLERANCE = 1e-6
_MOST_STEPS = 100_000  # a fraction of a second


class MixtureConfig(Section):
    """Each source's probability for a sample: numbers or schedules that add up to 1 at every step. Besides those below
    `replay`, `mixed` and `speculative` (see `rollout.replay` and so on) and the sources of plugins."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, FractionSchedule] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]  # other sources

    student: FractionSchedule = Field(1.0, description="lambda: probability that a completion is the student's")
    teacher: FractionSchedule = Field(0.0, description="probability that it is the teacher's, sampled once and cached")
    dataset: FractionSchedule = Field(0.0, description="probability that it is the data set's")

    @model_validator(mode="after")
    def _sources_are_known(self) -> MixtureConfig:
        for name in self.__pydantic_extra__:
            if name not in SOURCES:
                raise ValueError(f"{name}: {SOURCES.explain(name)}")
        for step in self._steps_to_check():
            total = sum(self.at(step).values())
            if abs(total - 1.0) > _TOLERANCE:
                when = "" if self.is_constant else f" at step {step}"
                names = " + ".join(self.shares)
                rest = max(0.0, self.at(step)["student"] + 1.0 - total)
                raise ValueError(f"{names} is {total:g}{when}, must be 1; set student to {rest:g}")
        return self

    @property
    def shares(self) -> dict[str, float | Ramp]:
        return {"student": self.student, "teacher": self.teacher, "dataset": self.dataset, **self.__pydantic_extra__}

    @property
    def is_constant(self) -> bool:
        return not any(isinstance(share, Ramp) for share in self.shares.values())

    def at(self, step: int) -> Mapping[str, float]:
        """Each source's probability at a step; exact 0 where it has none."""
        return {name: value_at(share, step) for name, share in self.shares.items()}

    def uses(self, source: str) -> bool:
        """Whether it gets anything at some step."""
        return largest(self.shares.get(source, 0.0)) > 0

    def asks_sampler(self, step: int) -> bool:
        """Whether a source of the step may ask the student's sampler, on whichever rank."""
        return any(share > 0 and SOURCES.drawn(name).asks_sampler for name, share in self.at(step).items())

    @property
    def ever_asks_sampler(self) -> bool:
        return any(self.uses(name) and SOURCES.drawn(name).asks_sampler for name in self.shares)

    @property
    def with_teacher(self) -> list[str]:
        """Sources of texts that student and teacher draw together, in the step."""
        return [name for name in self.shares if SOURCES.drawn(name).with_teacher and self.uses(name)]

    def _steps_to_check(self) -> Iterable[int]:
        """Where ramps that run together cancel, their corners; else every step from the first ramp's start on."""
        ramps = [share for share in self.shares.values() if isinstance(share, Ramp)]
        changes: dict[tuple[int, int, str], float] = defaultdict(float)
        for ramp in ramps:
            changes[ramp.start, ramp.steps, ramp.shape] += ramp.to - ramp.from_
        if all(abs(change) <= _TOLERANCE for change in changes.values()):
            return [0, *sorted(corner for ramp in ramps for corner in (ramp.start, ramp.last_step))]
        first, last = min(ramp.start for ramp in ramps), max(ramp.last_step for ramp in ramps)
        if last - first > _MOST_STEPS:
            raise ValueError(
                f": ramps that do not run together are checked step by step, over at most {_MOST_STEPS} steps, and "
                f"these last {last - first}; give them the same start, steps and shape"
            )
        return [0, *range(first, last + 1)]
