"""The result of an evaluation: figures of three models side by side, and as JSON with keys that stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COLUMNS = {"teacher": "teacher", "student_before": "student before", "student_after": "student after"}
AXES = ("task", "efficiency", "compression")
FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % interval or quartiles; `low` and `high` are None where it was counted, or taken once."""

    value: float
    low: float | None = None
    high: float | None = None


Cell = Figure | str  # a figure, or why there is none


@dataclass(frozen=True)
class Row:
    """One measure of up to three models. A model that the measure does not apply to has no cell."""

    name: str
    title: str
    unit: str
    cells: Mapping[str, Cell]
    source: str = ""  # what it was measured on


@dataclass(frozen=True)
class Profile:
    """One measure by position in the completion, counted from 1. `buckets` hold their first and last position."""

    name: str
    title: str
    unit: str
    source: str
    buckets: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]  # of each bucket
    cells: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Axis:
    """The rows of one axis and how they were measured, or why they were not."""

    rows: tuple[Row, ...] = ()
    profiles: tuple[Profile, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    not_measured: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Up to three axes of the models that `models` names by column."""

    models: Mapping[str, str]
    axes: Mapping[str, Axis]

    @property
    def is_empty(self) -> bool:
        return all(axis.not_measured is not None for axis in self.axes.values())

    def as_json(self) -> dict[str, Any]:
        axes = {name: _axis_json(axis) for name, axis in self.axes.items()}
        return {"format": FORMAT, "models": dict(self.models), **axes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `as_json`."""
        axes = {name: _axis(value) for name, value in values.items() if name not in ("format", "models")}
        return cls(values["models"], axes)


def figure(value: float, interval: tuple[float, float] | None = None) -> Cell:
    """A figure, or the reason that it is none: JSON has no NaN."""
    values = (value, *(interval or ()))
    return Figure(*values) if all(map(math.isfinite, values)) else f"not finite: {value}"


def _axis_json(axis: Axis) -> dict[str, Any]:
    if axis.not_measured is not None:
        return {"not_measured": axis.not_measured}
    return {
        "settings": dict(axis.settings),
        "figures": {row.name: _row_json(row) for row in axis.rows},
        "profiles": {profile.name: _profile_json(profile) for profile in axis.profiles},
    }


def _row_json(row: Row) -> dict[str, Any]:
    cells = {column: _cell_json(cell) for column, cell in row.cells.items()}
    return {"title": row.title, "unit": row.unit, "source": row.source, **cells}


def _cell_json(cell: Cell) -> dict[str, Any]:
    if isinstance(cell, str):
        return {"not_measured": cell}
    spread = {} if cell.low is None else {"low": cell.low, "high": cell.high}
    return {"value": cell.value, **spread}


def _profile_json(profile: Profile) -> dict[str, Any]:
    cells = {column: list(values) for column, values in profile.cells.items()}
    return {
        "title": profile.title,
        "unit": profile.unit,
        "source": profile.source,
        "buckets": [list(bucket) for bucket in profile.buckets],
        "tokens": list(profile.tokens),
        **cells,
    }


def _axis(values: Mapping[str, Any]) -> Axis:
    if "not_measured" in values:
        return Axis(not_measured=values["not_measured"])
    return Axis(
        rows=tuple(_row(name, row) for name, row in values["figures"].items()),
        profiles=tuple(_profile(name, profile) for name, profile in values["profiles"].items()),
        settings=values["settings"],
    )


def _row(name: str, values: Mapping[str, Any]) -> Row:
    cells = {column: _cell(values[column]) for column in COLUMNS if column in values}
    return Row(name, values["title"], values["unit"], cells, values["source"])


def _cell(values: Mapping[str, Any]) -> Cell:
    return values["not_measured"] if "not_measured" in values else Figure(**values)


def _profile(name: str, values: Mapping[str, Any]) -> Profile:
    return Profile(
        name,
        values["title"],
        values["unit"],
        values["source"],
        tuple((first, last) for first, last in values["buckets"]),
        tuple(values["tokens"]),
        {column: tuple(values[column]) for column in COLUMNS if column in values},
    )
