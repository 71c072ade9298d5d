"""The comparisons that `gkd bench table` makes: of what, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.bench import plan, tables
from gkd.bench.differences import addition_rows, additions_verdict
from gkd.bench.options import named
from gkd.bench.plan import Setting
from gkd.bench.rows import Rows
from gkd.bench.sizes import Size

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Names of its records begin with `record`."""

    name: str
    record: str
    settings: Callable[[Path, Size], list[Setting]]
    tables: Callable[[Record], list[Rows]]
    verdict: Callable[[Record], str]


def _of_divergences(record: Record) -> list[Rows]:
    return [
        tables.method_rows(record),
        tables.grid_rows(record, "greedy"),
        tables.temperature_rows(record),
        tables.ratio_rows(record),
        tables.sweep_rows(record, "greedy"),
        tables.sweep_rows(record, "sampled"),
    ]


def _of_additions(record: Record) -> list[Rows]:
    return [tables.method_rows(record), addition_rows(record)]


PARTS = {
    part.name: part
    for part in (
        Part("divergences", "gkd_table", plan.divergences, _of_divergences, tables.verdict),
        Part("additions", "gkd_additions", plan.added, _of_additions, additions_verdict),
    )
}


def part_named(name: str) -> Part:
    """Raises InputError."""
    return named(PARTS, name, "--part")
