"""Figures as text, and a table's rows for the terminal. The first row is the header."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.bench.summary import Estimate

Rows = list[list[str]]


def percent(found: Estimate | None) -> str:
    """A share with the half-width of its interval, both in percent."""
    return number(found, 100.0, 1)


def number(found: Estimate | None, scale: float = 1.0, digits: int = 3) -> str:
    if found is None:
        return "–"
    spread = "" if found.half_width is None else f" ± {scale * found.half_width:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{spread}"


def difference(found: Estimate | None, scale: float = 1.0, digits: int = 3) -> str:
    """As `number`, with its sign."""
    text = number(found, scale, digits)
    return f"+{text}" if found is not None and found.mean > 0 else text


def columns(rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, all others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for first, *rest in rows:
        cells = (cell.rjust(width + 2) for cell, width in zip(rest, widths[1:], strict=True))
        print(first.ljust(widths[0]) + "".join(cells))
