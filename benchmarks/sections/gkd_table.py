"""The comparison of ways to distil, for docs/table.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from table import pages

from .reading import Record, records
from .text import markdown, section

Tables = Callable[[Record], list[pages.Rows]]


def gkd_table_section(results: Path, tables: Tables) -> str:
    """Tables that `tables` makes of a record, one record a size."""
    found = (rows for record in records(results, "gkd_table").values() for rows in tables(record))
    return section(markdown(header, lines) for header, *lines in found)


def verdict_section(results: Path) -> str:
    """With what each record was measured, and what to conclude from it."""
    found = records(results, "gkd_table").values()
    return section(f"{pages.caption(record)}\n\n{pages.verdict(record)}" for record in found)


TABLES: dict[str, Tables] = {
    "gkd_table": lambda record: [pages.method_rows(record)],
    "gkd_table-tasks": lambda record: [pages.task_rows(record)],
    "gkd_table-grid": lambda record: [pages.grid_rows(record, "greedy"), pages.grid_rows(record, "sampled")],
    "gkd_table-temperature": lambda record: [pages.temperature_rows(record)],
    "gkd_table-ratios": lambda record: [pages.ratio_rows(record)],
    "gkd_table-sweep": lambda record: [pages.sweep_rows(record, "greedy"), pages.sweep_rows(record, "sampled")],
}

GKD_TABLE_SECTIONS: dict[str, Callable[[Path], str]] = {
    "gkd_table-verdict": verdict_section,
    **{name: partial(gkd_table_section, tables=tables) for name, tables in TABLES.items()},
}
