"""From cells to figures: means over seeds with their intervals, and the paper's ratio of gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.bench.methods import START

# Student's t, two-sided 95 %, by degrees of freedom from 1 on (any statistics table).
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

CellResult = dict[str, Any]  # one of a record's cells: setting, method, seed, scores ...
Figure = Callable[[CellResult], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; half the width of its 95 % t-interval, None of a single seed."""

    mean: float
    half_width: float | None
    seeds: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over the same seeds. Without an interval the data do not bound it."""

    value: float
    interval: tuple[float, float] | None
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value a seed."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    return Estimate(mean, _T_95[count - 2] * statistics.stdev(values) / math.sqrt(count), count)


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Fieller's 95 % interval for pairs (Fieller 1954, J. R. Stat. Soc. B 16): every ratio r for which the mean of
    above - r below does not differ from 0 by a t-test. None where those are not an interval, or with one seed."""
    count, x, y = len(above), statistics.fmean(above), statistics.fmean(below)
    value = x / y
    if count < 2:
        return Ratio(value, None, count)
    scale = _T_95[count - 2] ** 2 / count
    a = y * y - scale * statistics.variance(below)
    b = x * y - scale * _covariance(above, below)
    c = x * x - scale * statistics.variance(above)
    if a <= 0:
        return Ratio(value, None, count)
    width = math.sqrt(max(0.0, b * b - a * c))
    return Ratio(value, ((b - width) / a, (b + width) / a), count)


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    mean, other_mean = statistics.fmean(one), statistics.fmean(other)
    return sum((a - mean) * (b - other_mean) for a, b in zip(one, other, strict=True)) / (len(one) - 1)


# ---- figures of a cell


def score(name: str, task: str | None = None) -> Figure:
    """A score of the cell; of one that is given by task, the task's or the mean over tasks."""

    def figure(cell: CellResult) -> float:
        value = cell["scores"][name]
        if not isinstance(value, dict):
            return math.nan if value is None else value
        return value[task] if task else statistics.fmean(value.values())

    return figure


# ---- choosing cells


def finished(cells: Iterable[CellResult]) -> list[CellResult]:
    return [cell for cell in cells if "failed" not in cell]


def of(cells: Iterable[CellResult], label: str, setting: str = "") -> list[CellResult]:
    """The finished cells of a method, by seed."""
    chosen = [cell for cell in finished(cells) if cell["setting"] == setting and cell["method"]["label"] == label]
    return sorted(chosen, key=lambda cell: cell["seed"])


def labels(cells: Iterable[CellResult], *groups: str) -> list[str]:
    """The methods of the table itself, in its order."""
    wanted = (cell for cell in cells if cell["setting"] == "" and cell["method"]["group"] in groups)
    return list(dict.fromkeys(cell["method"]["label"] for cell in wanted))


def over_seeds(cells: Sequence[CellResult], figure: Figure) -> Estimate | None:
    """None where no cell has it."""
    values = [value for value in map(figure, cells) if not math.isnan(value)]
    return estimate(values) if values else None


def gains(
    cells: Sequence[CellResult], method: str, figure: Figure, setting: str = "", *, over: str = START.label
) -> dict[int, float]:
    """How much more a method's student has of a figure than that of another, by seed."""
    before, after = ({cell["seed"]: figure(cell) for cell in of(cells, label, setting)} for label in (over, method))
    return {seed: after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())}


def gain_ratio(
    cells: Sequence[CellResult], method: str, baseline: str, figure: Figure, setting: str = ""
) -> Ratio | None:
    """Gain of `method` divided by that of `baseline`, over the seeds that both have.

    None without such seeds, or if the baseline gains nothing.
    """
    above, below = gains(cells, method, figure, setting), gains(cells, baseline, figure, setting)
    seeds = sorted(above.keys() & below.keys())
    if sum(below[seed] for seed in seeds) <= 0:
        return None
    return ratio_of_means([above[seed] for seed in seeds], [below[seed] for seed in seeds])
