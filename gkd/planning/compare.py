"""A prediction held against a run that happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.errors import DataError
from gkd.files import read_json_object
from gkd.planning.time import TimePlan


@dataclass(frozen=True)
class Comparison:
    """Seconds a step by phase, as a run's timers see them, predicted and measured."""

    origin: str
    predicted_s: Mapping[str, float]
    measured_s: Mapping[str, float]

    def error(self, phase: str) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_s[phase] / self.measured_s[phase] - 1.0

    @property
    def step_error(self) -> float:
        return sum(self.predicted_s.values()) / sum(self.measured_s.values()) - 1.0

    @property
    def slowdown(self) -> float:
        """Measured by predicted seconds of all phases: one number for a machine that was busier, or code that was."""
        return sum(self.measured_s.values()) / sum(self.predicted_s.values())

    def error_beside_slowdown(self, phase: str) -> float:
        """What is left of `error` when every prediction is multiplied by `slowdown`."""
        return self.predicted_s[phase] * self.slowdown / self.measured_s[phase] - 1.0


def compare(plan: TimePlan, path: Path) -> Comparison:
    """Reads a run's summary.json, or a record of benchmarks/results. Raises DataError for anything else."""
    return compare_summary(plan, _summary(path), str(path))


def compare_summary(plan: TimePlan, summary: Mapping[str, Any], origin: str) -> Comparison:
    """The same with a summary that was read already; `origin` is its name. Raises DataError for what it lacks."""
    steps = summary.get("steps")
    if not isinstance(steps, int) or steps < 1:
        raise DataError(f"{origin}: no `steps`; expected a run's summary.json or a record of one")
    measured: dict[str, float] = {}
    for phase in plan.phases:
        seconds = summary.get(f"time/{phase}_s")
        if not isinstance(seconds, int | float) or seconds <= 0:
            raise DataError(f"{origin}: no `time/{phase}_s`; expected a run's summary.json or a record of one")
        measured[phase] = seconds / steps
    return Comparison(origin, plan.timed_s, measured)


def _summary(path: Path) -> dict[str, Any]:
    values = read_json_object(path, DataError)
    values = values.get("summary", values)
    if not isinstance(values, dict):
        raise DataError(f"{path}:1: expected a JSON object")
    return values
