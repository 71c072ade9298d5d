"""Which charts a report shows. The metrics come from `METRICS`: a new one is drawn without a change here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd.monitor.metrics import description_of, in_order
from gkd.monitor.titles import DIVERGENCE_TITLES, PHASE_TITLES
from gkd.report.data import Column, RunData

COLOURS = 8  # c0 to c7 in report.css; more lines than that take them in turn
MAX_POINTS = 20_000  # of a line in the file: beyond, the least and the greatest of every few steps stand for them

_SECTIONS: dict[str, tuple[str, ...]] = {  # heading -> what its metrics' names begin with
    "Loss and divergence": ("loss", "objective", "task", "divergence"),
    "Entropy and agreement": ("entropy", "agreement"),
    "Optimizer": ("lr", "grad_norm"),
    "Throughput": ("tokens",),
    "Time of a step": ("time",),
    "Conversations": ("reward", "environment"),
    "Mixture and weights": ("mixture", "samples", "leakage", "rollout", "mismatch", "sync"),
}
_CHART_TITLES = {
    "loss": "Loss",
    "objective": "Terms of the objective",
    "task": "Rows of each task",
    "divergence": "Divergence from the teacher",
    "heldout": "Held-out divergence from the teacher",
    "entropy": "Entropy of the next token",
    "agreement": "Same most likely token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens": "Tokens",
    "time": "Time by phase",
    "reward": "Rewards of conversations",
    "environment": "Conversations with the environment",
    "mixture": "Who wrote the step's samples",
    "samples": "Texts sampled from the student",
    "leakage": "Copied from what the teacher alone reads",
    "rollout": "Staleness of the sampler's weights",
    "mismatch": "Trainer against sampler, on the step's own samples",
    "sync": "Trainer against sampler, on the probe",
}
_LEFT_OUT = {"step", "time/train_s", "time/step_s", "weights_version"}  # sums of others, or shown as staleness
_ONLY_IF_USED = {"mixture/student", "mixture/teacher", "mixture/dataset"}  # a source without a sample says nothing
_LABELS = {"agreement/top1": "agreement"}
_EXACT = {"lr", "rollout", "heldout"}
_STACKED = {"time", "mixture"}
_STALENESS = "rollout/staleness"  # where a run did not record it, by its weights' versions


@dataclass(frozen=True)
class Line:
    """One line: metric `name` of run `run`, on the x axes `axes` ("steps", or "heldout/..." for figures in between)."""

    run: int
    name: str
    label: str
    meaning: str
    colour: int
    axes: str = "steps"


@dataclass(frozen=True)
class Chart:
    """A stack adds its lines up. `by_run`: a line stands for a run, so it is hidden and shown with it.

    `exact`: never smoothed, as what is set rather than measured, and as figures that are few.
    """

    title: str
    unit: str
    kind: Literal["line", "stack"]
    by_run: bool
    exact: bool = False
    lines: list[Line] = field(default_factory=list)


def heldout_charts(runs: Sequence[RunData]) -> list[Chart]:
    """How the held-out divergences went, if any was measured more than once."""
    names = dict.fromkeys(name for run in runs for name, curve in run.heldout.items() if len(curve.values) > 1)
    return _line_charts(runs, list(names), "heldout", "nats") if names else []


def chart_sections(runs: Sequence[RunData]) -> dict[str, list[Chart]]:
    """Heading -> charts, for every metric that some run recorded; metrics unknown to this version come last."""
    names = in_order({name for run in runs for name in run.metrics})
    names = [name for name in names if name not in _ONLY_IF_USED or any(any(run.metrics.get(name, ())) for run in runs)]
    if _STALENESS not in names and any("weights_version" in run.metrics for run in runs):
        names.append(_STALENESS)
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name not in _LEFT_OUT and not name.startswith("heldout/"):
            groups.setdefault((name.split("/")[0], describe(name)[0]), []).append(name)
    sections: dict[str, list[Chart]] = {heading: [] for heading in (*_SECTIONS, "Other")}
    for (prefix, unit), members in groups.items():
        heading = next((heading for heading, prefixes in _SECTIONS.items() if prefix in prefixes), "Other")
        sections[heading] += _charts(runs, members, prefix, unit)
    return {heading: charts for heading, charts in sections.items() if charts}


def describe(name: str) -> tuple[str, str]:
    """(unit, meaning) of a metric; empty for one that this version does not know."""
    unit, meaning = (description_of(name) or ": ").split(": ", 1)
    return unit, meaning


def metric_label(name: str) -> str:
    """What a legend calls a metric: `forward KL`, `sample`, `teacher`."""
    prefix, _, rest = name.partition("/")
    if prefix == "time":
        phase = rest.removesuffix("_s")
        return PHASE_TITLES.get(phase, phase.replace("_", " "))
    if prefix == "tokens":
        return rest.removesuffix("_per_s").replace("_", " ")
    if name in _LABELS:
        return _LABELS[name]
    return DIVERGENCE_TITLES.get(rest, (rest or _CHART_TITLES.get(name, name)).replace("_", " "))


def run_payload(run: RunData) -> dict[str, Any]:
    """A run's numbers for the page's script: `axes` and `metrics`, short enough to draw and to send."""
    columns = {name: column for name, column in run.metrics.items() if not name.startswith("heldout/")}
    versions = run.metrics.get("weights_version")
    if versions is not None and _STALENESS not in columns:
        pairs = zip(run.steps, versions, strict=True)
        columns[_STALENESS] = [None if version is None else step - version for step, version in pairs]
    columns = {name: column for name, column in columns.items() if name not in _LEFT_OUT}
    bounds = _buckets(len(run.steps))
    axes = {"step": run.steps, "seconds": run.seconds, "tokens": run.tokens}
    payload = {
        "label": run.label,
        "axes": {"steps": {name: _rounded(_ends(values, bounds), 9) for name, values in axes.items()}},
        "metrics": {name: _rounded(_extremes(column, bounds), 5) for name, column in columns.items()},
    }
    for name, curve in run.heldout.items():
        payload["axes"][name] = _heldout_axes(run, curve.steps)
        payload["metrics"][name] = _rounded(curve.values, 6)
    return payload


def _charts(runs: Sequence[RunData], names: list[str], prefix: str, unit: str) -> list[Chart]:
    if prefix == "time":  # what a step consists of is compared by shape: one stack a run
        return [chart for place, run in enumerate(runs) if (chart := _stack(runs, place, run, names, prefix, unit))]
    if prefix in _STACKED and len(runs) == 1:
        chart = _stack(runs, 0, runs[0], names, prefix, unit)
        return [chart] if chart else []
    return _line_charts(runs, names, prefix, unit)


def _stack(runs: Sequence[RunData], place: int, run: RunData, names: list[str], prefix: str, unit: str) -> Chart | None:
    present = [name for name in names if any(run.metrics.get(name) or ())]
    title = _title(prefix, unit) + (f": {run.label}" if len(runs) > 1 else "")
    lines = [Line(place, name, metric_label(name), describe(name)[1], names.index(name) % COLOURS) for name in present]
    return Chart(title, unit, "stack", False, lines=lines) if lines else None


def _line_charts(runs: Sequence[RunData], names: list[str], prefix: str, unit: str) -> list[Chart]:
    """One run: a chart with a line a metric. Several: a chart a metric with a line a run."""
    if len(runs) == 1:
        chart = Chart(_title(prefix, unit), unit, "line", False, prefix in _EXACT)
        for place, name in enumerate(names):
            axes = name if prefix == "heldout" else "steps"
            chart.lines.append(Line(0, name, metric_label(name), describe(name)[1], place % COLOURS, axes))
        return [chart]
    return [_overlay(runs, name, prefix, unit, alone=len(names) == 1) for name in names]


def _overlay(runs: Sequence[RunData], name: str, prefix: str, unit: str, *, alone: bool) -> Chart:
    title = _title(prefix, unit) + ("" if alone and "/" not in name else f": {metric_label(name)}")
    axes = name if prefix == "heldout" else "steps"
    lines = [
        Line(place, name, run.label, describe(name)[1], place % COLOURS, axes)
        for place, run in enumerate(runs)
        if name in run.metrics or name in run.heldout or (name == _STALENESS and "weights_version" in run.metrics)
    ]
    return Chart(title, unit, "line", True, prefix in _EXACT, lines)


def _title(prefix: str, unit: str) -> str:
    title = _CHART_TITLES.get(prefix, prefix.replace("_", " ").capitalize())
    return f"{title} a second" if unit.endswith("/s") else f"{title} a step" if unit == "tokens" else title


def _heldout_axes(run: RunData, steps: list[int]) -> dict[str, Column]:
    """Where held-out figures stand: 0 before the first step, else at the end of the step before them."""
    place_of = {step + 1: place for place, step in enumerate(run.steps)}
    places = [place_of.get(step) for step in steps]
    seconds, tokens = run.seconds, run.tokens
    return {
        "step": [float(step) for step in steps],
        "seconds": _rounded([0.0 if place is None else seconds[place] for place in places], 9),
        "tokens": [0.0 if place is None else tokens[place] for place in places],
    }


def _buckets(count: int) -> list[tuple[int, int]]:
    """[start, end) of each pair of points that stands for several records; empty where every record is a point."""
    if count <= MAX_POINTS:
        return []
    pairs = MAX_POINTS // 2
    return [(place * count // pairs, (place + 1) * count // pairs) for place in range(pairs)]


def _ends(values: Sequence[float], buckets: list[tuple[int, int]]) -> Sequence[float]:
    return [values[at] for start, end in buckets for at in (start, end - 1)] if buckets else values


def _extremes(column: Column, buckets: list[tuple[int, int]]) -> Column:
    """The least and the greatest of each bucket, in the order in which they came."""
    return [value for start, end in buckets for value in _extreme_pair(column[start:end])] if buckets else column


def _extreme_pair(values: Column) -> Iterator[float | None]:
    finite = [value for value in values if value is not None]
    if not finite:
        return iter((None, None))
    low, high = min(finite), max(finite)
    return iter((low, high) if finite.index(low) <= finite.index(high) else (high, low))


def _rounded(values: Sequence[float | None], digits: int) -> Column:
    """Enough digits for a screen; whole numbers without a point, as JSON is text."""
    return [None if value is None else _shortest(float(f"{value:.{digits}g}")) for value in values]


def _shortest(value: float) -> float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
