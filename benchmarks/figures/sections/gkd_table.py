"""The comparison of ways to distil, for docs/table.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.text import markdown, section
from gkd.bench import tables
from gkd.bench.differences import addition_rows
from gkd.bench.parts import PARTS, Part
from gkd.bench.rows import Rows

Tables = Callable[[Record], list[Rows]]


def tables_section(results: Path, kind: str, make: Tables) -> str:
    """Tables that `make` makes of a record, one record a size."""
    found = (rows for record in records(results, kind).values() for rows in make(record))
    return section(markdown(header, lines) for header, *lines in found)


def verdict_section(results: Path, part: Part) -> str:
    """With what each record was measured, and what to conclude from it."""
    found = records(results, part.record).values()
    return section(f"{tables.caption(record)}\n\n{part.verdict(record)}" for record in found)


def differences_section(results: Path) -> str:
    """The picture of each record over its table."""
    return section(
        f"![Accuracy less that of the method without the addition](plots/{name}_differences.svg)\n\n"
        + markdown(rows[0], rows[1:])
        for name, record in records(results, "gkd_additions").items()
        for rows in [addition_rows(record)]
    )


TABLES: dict[str, Tables] = {
    "gkd_table": lambda record: [tables.method_rows(record)],
    "gkd_table-tasks": lambda record: [tables.task_rows(record)],
    "gkd_table-grid": lambda record: [tables.grid_rows(record, "greedy"), tables.grid_rows(record, "sampled")],
    "gkd_table-temperature": lambda record: [tables.temperature_rows(record)],
    "gkd_table-ratios": lambda record: [tables.ratio_rows(record)],
    "gkd_table-sweep": lambda record: [tables.sweep_rows(record, "greedy"), tables.sweep_rows(record, "sampled")],
    "gkd_additions": lambda record: [tables.method_rows(record)],
    "gkd_additions-tasks": lambda record: [tables.task_rows(record)],
}

GKD_TABLE_SECTIONS: dict[str, Callable[[Path], str]] = {
    **{f"{part.record}-verdict": partial(verdict_section, part=part) for part in PARTS.values()},
    "gkd_additions-differences": differences_section,
    **{name: partial(tables_section, kind=name.split("-")[0], make=make) for name, make in TABLES.items()},
}
