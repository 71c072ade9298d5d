"""Students of several sizes out of one teacher, as `gkd shape` shows them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import section
from gkd.shape.show import markdown


def shape_section(results: Path) -> str:
    """One table a record."""
    parts: list[str] = []
    for record in records(results, "shape").values():
        parts += [f"{record['device']}, {record['versions']}; `{record['command']}`.", markdown(record).strip()]
    return section(parts)
