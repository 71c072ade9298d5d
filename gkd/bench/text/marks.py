"""Where runs are compared: at equally many trained tokens, and after equally many seconds.

A run is looked at at points of its tokens. Nothing is interpolated: the tokens' mark is the first look of at least so
many tokens, which are more by less than a batch; the seconds' mark is the last look that was reached in time. A step's
seconds are not those of the run, which may have shared its machine: each method was timed in short rounds, one method
after another, and its seconds are the median over rounds of the median over steps. The teacher's texts that a step
trains on count, at the seconds that sampling them took.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gkd.bench.text.methods import START
from gkd.bench.text.plan import TEXTS

Record = dict[str, Any]
Mark = Literal["tokens", "seconds"]


@dataclass(frozen=True)
class Reading:
    """A run at a mark."""

    seed: int
    look: dict[str, Any]


def readings(record: Record, label: str, mark: Mark) -> list[Reading]:
    """Of a method's finished runs, by seed; of the initial student its one look. A run that ended before the tokens'
    mark is read at its end."""
    runs = [run for run in finished(record) if run["method"] == label]
    if label == START.label:
        return [Reading(run["seed"], run["looks"][0]) for run in runs]
    if mark == "tokens":
        return [Reading(run["seed"], _with_tokens(run, record["size"]["trained_tokens"])) for run in runs]
    step_s, seconds = step_seconds(record)[label], common_seconds(record)
    return [Reading(run["seed"], _within(run, step_s, seconds)) for run in runs]


def finished(record: Record) -> list[dict[str, Any]]:
    return [run for run in record["runs"] if "failed" not in run]


def _with_tokens(run: dict[str, Any], tokens: int) -> dict[str, Any]:
    return next((look for look in run["looks"] if look["tokens"] >= tokens), run["looks"][-1])


def _within(run: dict[str, Any], step_s: float, seconds: float) -> dict[str, Any]:
    return [look for look in run["looks"] if look["step"] * step_s <= seconds][-1]


def step_seconds(record: Record) -> dict[str, float]:
    """Of each method, its share of the teacher's texts included; empty without a whole round of the timing."""
    rounds = record["times"]
    if not rounds:
        return {}
    text_s = statistics.median(found[TEXTS]["text_s"] for found in rounds)
    return {
        method["label"]: statistics.median(_step_s(found[method["label"]]["steps"]) for found in rounds)
        + (1.0 - method["student_share"]) * record["size"]["batch_size"] * text_s
        for method in record["size"]["methods"]
    }


def _step_s(steps: Sequence[dict[str, float]]) -> float:
    """The first is warm-up."""
    return statistics.median(step["all"] for step in steps[1:])


def common_seconds(record: Record) -> float:
    """The longest time that every run has trained for."""
    step_s = step_seconds(record)
    runs = [run for run in finished(record) if run["method"] in step_s]
    return min((run["looks"][-1]["step"] * step_s[run["method"]] for run in runs), default=0.0)
