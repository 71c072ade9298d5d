"""Values that change during a run: a number, a ramp over steps, or a rule that follows a metric.

    weight: 0.5
    weight: {from: 0.0, to: 0.3, steps: 500, shape: cosine, start: 100}
    weight: {metric: heldout/forward_kl, from: 1.0, to: 0.2, low: 0.5, high: 2.0, smoothing: 0.9}

A ramp is a function of the step alone. What a rule remembers of its metric is in `MetricMemory`, which a checkpoint
holds. Both stay between `from` and `to`, so the ends are all that has to be checked, and the larger one is all that
engines and caches need to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from gkd.registry import Registry
from gkd.schema import Section

Shape = Callable[[float], float]  # from the share of the steps that are done to the share of the way, both in [0, 1]


def linear(progress: float) -> float:
    return progress


def cosine(progress: float) -> float:
    """Slow at both ends: (1 - cos(pi x)) / 2."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def step(progress: float) -> float:
    """Nothing, and all of it at the end."""
    return 1.0 if progress >= 1.0 else 0.0


SHAPES: Registry[Shape] = Registry("shape", {name: f"{__name__}:{name}" for name in ("linear", "cosine", "step")})


class _Change(Section):
    model_config = ConfigDict(serialize_by_alias=True)  # `from` is no name in Python

    from_: float = Field(alias="from")
    to: float

    @property
    def ends(self) -> tuple[float, float]:
        return self.from_, self.to

    def _between(self, share: float) -> float:
        return self.from_ + (self.to - self.from_) * min(1.0, max(0.0, share))


class Ramp(_Change):
    """From one value to another over `steps` steps, beginning at step `start`; constant before and after."""

    steps: int = Field(ge=1)
    shape: str = "linear"
    start: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _shape_is_known(self) -> Ramp:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: {SHAPES.explain(self.shape)}")
        return self

    def at(self, step: int) -> float:
        progress = min(1.0, max(0.0, (step - self.start) / self.steps))
        return self._between(SHAPES[self.shape](progress))

    @property
    def last_step(self) -> int:
        """From there on nothing changes."""
        return self.start + self.steps


class MetricRule(_Change):
    """from + (to - from) clip((m - low) / (high - low), 0, 1), m the exponential mean of a metric of the global batch.

    Before the metric was logged for the first time: `from`. m <- smoothing m + (1 - smoothing) (new value).
    """

    metric: str
    low: float
    high: float
    smoothing: float = Field(0.9, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _range_is_one(self) -> MetricRule:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} is not below high = {self.high:g}")
        if self.metric.split("/")[0] in _MEASURED_BY_EACH_RANK:
            raise ValueError(f"metric: {self.metric} differs from rank to rank; choose one of the global batch")
        return self

    def at(self, mean: float | None) -> float:
        return self.from_ if mean is None else self._between((mean - self.low) / (self.high - self.low))

    @property
    def key(self) -> str:
        """Rules of one key share a mean."""
        return f"{self.metric} {self.smoothing:g}"


_MEASURED_BY_EACH_RANK = {"time", "sync", "rollout"}

Schedule: TypeAlias = float | Ramp | MetricRule


class MetricMemory:
    """The exponential means that rules go by. Plain values: a checkpoint's JSON holds all of it."""

    def __init__(self, rules: Iterable[MetricRule]) -> None:
        self._rules = {rule.key: rule for rule in rules}
        self.means: dict[str, float] = {}

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """What was logged of a step, the same on all ranks. A value that is no finite number leaves its mean alone."""
        for key, rule in self._rules.items():
            value = metrics.get(rule.metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                mean = self.means.get(key, value)
                self.means[key] = rule.smoothing * mean + (1.0 - rule.smoothing) * value

    def value(self, schedule: Schedule, step: int) -> float:
        """What a schedule is at a step."""
        if isinstance(schedule, MetricRule):
            return schedule.at(self.means.get(schedule.key))
        return value_at(schedule, step)


def value_at(schedule: float | Ramp, step: int) -> float:
    return schedule.at(step) if isinstance(schedule, Ramp) else schedule


def ends_of(schedule: Schedule) -> tuple[float, float]:
    return (schedule, schedule) if isinstance(schedule, (int, float)) else schedule.ends


def largest(schedule: Schedule) -> float:
    return max(ends_of(schedule))


def describe_schedule(schedule: Schedule) -> str:
    """A few words for people."""
    if isinstance(schedule, MetricRule):
        ends, metric = f"{schedule.from_:g} to {schedule.to:g}", schedule.metric
        return f"{ends} as {metric} goes from {schedule.low:g} to {schedule.high:g}"
    if isinstance(schedule, Ramp):
        return f"{schedule.from_:g} to {schedule.to:g} over {schedule.steps} steps"
    return f"{schedule:g}"


def _sort_of(value: Any) -> str:
    """A mapping is a ramp or a rule by what stands in it, so that an error is that of the one that was meant."""
    if isinstance(value, (Mapping, MetricRule)):
        return RULE if isinstance(value, MetricRule) or "metric" in value else RAMP
    return RAMP if isinstance(value, Ramp) else NUMBER


# What pydantic puts into the path of an error, where no key of a config is.
NUMBER, RAMP, RULE = "<number>", "<ramp>", "<rule>"
_Ramp = Annotated[Ramp, Tag(RAMP)]
_Number = Annotated[float, Tag(NUMBER)]
_Steered = Annotated[_Number | _Ramp | Annotated[MetricRule, Tag(RULE)], Discriminator(_sort_of)]
_BY_STEP = Discriminator(
    _sort_of,
    custom_error_type="no_rule_here",
    custom_error_message=": a rule that follows a metric is for weights and temperatures; give a number, or from, to "
    "and steps",
)
_Planned = Annotated[_Number | _Ramp, _BY_STEP]
_Count = Annotated[Annotated[int, Tag(NUMBER)] | _Ramp, _BY_STEP]


def _within(low: float, high: float = math.inf, is_open: bool = False) -> AfterValidator:
    def check(schedule: Schedule) -> Schedule:
        for end in ends_of(schedule):
            if end > high or end < low or (is_open and end == low):
                most = "" if high == math.inf else f" and at most {high:g}"
                raise ValueError(f": {end:g} must be {'above' if is_open else 'at least'} {low:g}{most}")
        return schedule

    return AfterValidator(check)


WeightSchedule: TypeAlias = Annotated[_Steered, _within(0.0)]
TemperatureSchedule: TypeAlias = Annotated[_Steered, _within(0.0, is_open=True)]
FractionSchedule: TypeAlias = Annotated[_Planned, _within(0.0, 1.0)]
CountSchedule: TypeAlias = Annotated[_Count, _within(1.0)]
