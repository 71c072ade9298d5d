"""A record as a table, for the terminal and in Markdown, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gkd.shape.front import Row, divergence, knee, nats, pareto

_HEADER = ("student", "M param.", "share", "cut", "probed", "ms a token", "s a step", "GB", "")


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """Without the header. What was measured, else all; the last column: on the front, and what --out would take."""
    rows: list[Row] = record["candidates"]
    front = pareto(rows)
    bend = knee(front)
    shown = [row for row in rows if "after_cut" in row or "failed" in row] or rows
    return [_cells(row, "suggested" if row is bend else "front" if row in front else "") for row in shown]


def _cells(row: Row, mark: str) -> list[str]:
    plan, nats = row["plan"], [row.get(name) for name in ("after_cut", "after_probe")]
    planned = ["–"] * 3
    if plan is not None:
        planned = [f"{1e3 * plan['token_s']:.3g}", f"{plan['step_s']:.3g}", f"{plan['peak_bytes'] / 1e9:.1f}"]
        mark = mark if plan["fits"] else f"{mark} does not fit".strip()
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['share']:.3f}",
        *("–" if one is None else f"{one:.3f}" for one in nats),
        *planned,
        "failed" if "failed" in row else mark,
    ]


def caption(record: dict[str, Any]) -> str:
    """What the figures are."""
    steps = record["probe_steps"]
    probed = f"after the cut, and after {steps} steps of the run" if steps else "after the cut"
    planned = (
        f"no plan, as {record['not_planned']}"
        if record["not_planned"]
        else f"of gkd plan, for one {record['planned_for']}: the latency of one text alone, and of the run seconds a "
        "step and memory"
    )
    return (
        f"Layers x channels x query heads out of {record['teacher']} ({record['teacher_layers']} layers, "
        f"{record['teacher_parameters'] / 1e6:.1f} M parameters), {record['choose']}. Forward KL in nats a token on "
        f"{record['calibration_tokens']} tokens of data.train's prompts, {probed}; {planned}."
    )


def render(record: dict[str, Any], console: Console) -> None:
    table = Table(box=None)
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="left" if index in (0, len(_HEADER) - 1) else "right", no_wrap=True)
    for cells in table_rows(record):
        table.add_row(*map(Text, cells))
    console.print(Text(caption(record)))
    console.print(table)


def markdown(record: dict[str, Any]) -> str:
    rule = ["---", *["---:"] * (len(_HEADER) - 2), "---"]
    lines: list[Sequence[str]] = [_HEADER, rule, *table_rows(record)]
    return f"{caption(record)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Divergence by parameters, after the cut and after the probe, with the front. Raises ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = [row for row in record["candidates"] if divergence(row) is not None]
    front = pareto(rows)
    for name, label in (("after_cut", "after the cut"), ("after_probe", f"after {record['probe_steps']} steps")):
        points = [(row["parameters"] / 1e6, row[name]) for row in rows if name in row]
        if points:
            axes.scatter(*zip(*points, strict=True), label=label)
    if front:
        axes.plot(*zip(*map(_point, front), strict=True), label="Pareto front")
    for row in rows:
        axes.annotate(row["name"], _point(row), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("forward KL from the teacher, nats a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _point(row: Row) -> tuple[float, float]:
    return row["parameters"] / 1e6, nats(row)
