"""An evaluation as a table for a terminal and as Markdown: one line a measure, one column a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gkd.evaluate.figures import COLUMNS, Axis, Cell, Evaluation, Figure, Profile

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SCALED = {"parameters": "", "FLOPs": "", "bytes": "B"}
_SMALLEST_PLAIN = 0.001
_MISSING = "not measured"
_SPREADS = {
    "task": "95 % bootstrap interval over prompts",
    "efficiency": "quartiles of the repetitions",
    "compression": "",
}


def render(evaluation: Evaluation, console: Console) -> None:
    """The table, then what the figures were measured on and why some are missing."""
    columns = _columns(evaluation)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(COLUMNS[column], justify="right")
    for name, axis in evaluation.axes.items():
        table.add_row()
        table.add_row(Text(name, style="bold"))
        for title, *cells in _lines(axis, columns):
            table.add_row(Text(title), *map(Text, cells))
    console.print(table)
    console.print()
    for note in _notes(evaluation):
        console.print(Text(note, style="dim"), soft_wrap=True)


def markdown(evaluation: Evaluation) -> str:
    """One table of all axes, and the notes as a list."""
    columns = _columns(evaluation)
    lines = ["# Evaluation", ""]
    lines += [_markdown_row(["", *(COLUMNS[column] for column in columns)])]
    lines += [_markdown_row(["---", *(["---:"] * len(columns))])]
    for name, axis in evaluation.axes.items():
        lines.append(_markdown_row([f"**{name}**", *([""] * len(columns))]))
        lines += [_markdown_row(line) for line in _lines(axis, columns)]
    lines += ["", *(f"- {_one_line(note)}" for note in _notes(evaluation)), ""]
    return "\n".join(lines)


def _columns(evaluation: Evaluation) -> list[str]:
    return [column for column in COLUMNS if column in evaluation.models]


def _lines(axis: Axis, columns: Sequence[str]) -> Iterator[list[str]]:
    """Title and cells of every line of an axis."""
    if axis.not_measured is not None:
        yield [_MISSING, *([""] * len(columns))]
    for row in axis.rows:
        title = row.title if row.unit in ("", *_SCALED) else f"{row.title}, {row.unit}"
        yield [title, *(_cell(row.cells.get(column), row.unit) for column in columns)]
    for profile in axis.profiles:
        yield [profile.title, *(_profile_cell(profile, column) for column in columns)]


def _profile_cell(profile: Profile, column: str) -> str:
    return " ".join(f"{value:.2f}" for value in profile.cells.get(column, ()))


def _cell(cell: Cell | None, unit: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return _MISSING
    if cell.low is None or cell.high is None:
        return _number(cell.value, unit)
    return f"{_number(cell.value, unit)} [{_number(cell.low, unit)}, {_number(cell.high, unit)}]"


def _number(value: float, unit: str) -> str:
    """Three significant digits, four of a count; the JSON has all of them."""
    digits = 4 if unit in _SCALED else 3
    if 0 < abs(value) < _SMALLEST_PLAIN:
        return f"{value:.1e}"
    scale, prefix = next(((s, p) for s, p in _SCALES if abs(value) >= s), (1.0, ""))
    whole = len(str(int(abs(value / scale)))) if abs(value) >= 1 else 0
    return f"{value / scale:.{max(0, digits - whole)}f} {prefix}{_SCALED.get(unit, '')}".rstrip()


def _notes(evaluation: Evaluation) -> Iterator[str]:
    for column in _columns(evaluation):
        yield f"{COLUMNS[column]}: {evaluation.models[column]}"
    for name, axis in evaluation.axes.items():
        if axis.not_measured is not None:
            yield f"{name} not measured: {axis.not_measured}"
            continue
        settings = ", ".join(f"{key} {value}" for key, value in axis.settings.items())
        if settings:
            yield f"{name}: {settings}; in brackets: {_SPREADS[name]}"
        for buckets, titles in _buckets(axis).items():
            yield f"{', '.join(titles)}: means over the completions' tokens {buckets}"
        for source, titles in _sources(axis).items():
            yield f"{', '.join(titles)}: on {source}"
        for reason, what in _reasons(axis).items():
            yield f"not measured: {', '.join(what)}: {reason}"


def _buckets(axis: Axis) -> dict[str, list[str]]:
    """Positions -> titles of the profiles over them."""
    found: dict[str, list[str]] = {}
    for profile in axis.profiles:
        positions = ", ".join(f"{first}-{last}" for first, last in profile.buckets)
        found.setdefault(positions, []).append(profile.title)
    return found


def _sources(axis: Axis) -> dict[str, list[str]]:
    """Source -> titles of the rows that were measured on it."""
    sources: dict[str, list[str]] = {}
    for row in axis.rows:
        if row.source and any(isinstance(cell, Figure) for cell in row.cells.values()):
            sources.setdefault(row.source, []).append(row.title)
    return sources


def _reasons(axis: Axis) -> dict[str, list[str]]:
    """Reason -> the cells that are missing for it."""
    reasons: dict[str, list[str]] = {}
    for row in axis.rows:
        for column, cell in row.cells.items():
            if isinstance(cell, str):
                reasons.setdefault(cell, []).append(f"{row.title} ({COLUMNS[column]})")
    return reasons


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell) for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
