"""The comparison of ways to distil, for docs/table.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.text import markdown, section
from gkd.bench import tables
from gkd.bench.rows import Rows

Tables = Callable[[Record], list[Rows]]


def gkd_table_section(results: Path, make: Tables) -> str:
    """Tables that `make` makes of a record, one record a size."""
    found = (rows for record in records(results, "gkd_table").values() for rows in make(record))
    return section(markdown(header, lines) for header, *lines in found)


def verdict_section(results: Path) -> str:
    """With what each record was measured, and what to conclude from it."""
    found = records(results, "gkd_table").values()
    return section(f"{tables.caption(record)}\n\n{tables.verdict(record)}" for record in found)


TABLES: dict[str, Tables] = {
    "gkd_table": lambda record: [tables.method_rows(record)],
    "gkd_table-tasks": lambda record: [tables.task_rows(record)],
    "gkd_table-grid": lambda record: [tables.grid_rows(record, "greedy"), tables.grid_rows(record, "sampled")],
    "gkd_table-temperature": lambda record: [tables.temperature_rows(record)],
    "gkd_table-ratios": lambda record: [tables.ratio_rows(record)],
    "gkd_table-sweep": lambda record: [tables.sweep_rows(record, "greedy"), tables.sweep_rows(record, "sampled")],
}

GKD_TABLE_SECTIONS: dict[str, Callable[[Path], str]] = {
    "gkd_table-verdict": verdict_section,
    **{name: partial(gkd_table_section, make=make) for name, make in TABLES.items()},
}
