"""The plots of all results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.bench_text import KIND, drift_plot
from benchmarks.figures.sections.gkd_table_plots import differences_plot
from benchmarks.figures.sections.gkd_table_plots import plots as table_plots
from benchmarks.figures.sections.reading import BOTH, Row, divergence_name, floor_ms, grouped, read, records, shape
from benchmarks.figures.sections.scaling import scaling_plots
from benchmarks.figures.sections.style import LINE, OURS, PEER, TEXT, figure
from benchmarks.figures.sections.text import three_digits


def plots(results: Path, folder: Path) -> list[Path]:
    """Writes them as SVG: bars of the losses, curves and grid of each gkd_table, differences of each gkd_additions,
    drift of each bench_text, growth of each scaling record."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = records(results, "gkd_table").items()
    return [
        *(path for name, record in tables for path in table_plots(record, name, folder)),
        *(differences_plot(record, name, folder) for name, record in records(results, "gkd_additions").items()),
        *(drift_plot(record, name, folder) for name, record in records(results, KIND).items()),
        *loss_plots(results, folder),
        *scaling_plots(results, folder),
    ]


def loss_plots(results: Path, folder: Path) -> list[Path]:
    """One for each CSV, kind and dtype, a panel for each shape."""
    made = []
    for op in ("divergence", "linear_divergence"):
        for name, rows in read(results, op).items():
            ran = [row for row in rows if row["work"] == BOTH and row["ms_p50"]]
            for group in grouped(ran, "kind", "dtype"):
                path = folder / f"{name}_{group[0]['kind']}_{group[0]['dtype']}.svg"
                plot(group, path)
                made.append(path)
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars of ms with quantiles; the dashed line is what no implementation gets below."""
    cases = grouped(rows, *(name for name in ("rows", "student_hidden", "teacher_hidden", "vocab") if name in rows[0]))
    bars = [len(case) for case in cases]
    size = (7, 0.26 * sum(bars) + 0.8 * len(cases))
    with figure(path, rows=len(cases), columns=1, size=size, height_ratios=bars) as panels:
        for panel, case in zip(panels, cases, strict=True):
            draw(panel, case)
        panels[-1].set_xlabel("ms")


def draw(axes: Any, case: Sequence[Row]) -> None:
    """One case, the fastest on top."""
    bare = next((float(row["ms_p50"]) for row in case if row["implementation"] == "bare_gemms"), None)
    floor, floor_name = (bare, "matrix products alone") if bare else (floor_ms(case), "copy of the same bytes")
    case = sorted(
        (row for row in case if row["implementation"] != "bare_gemms"),
        key=lambda row: float(row["ms_p50"]),
        reverse=True,
    )
    names, times = [row["implementation"] for row in case], [float(row["ms_p50"]) for row in case]
    spread = [
        [ms - float(row["ms_p20"]) for ms, row in zip(times, case, strict=True)],
        [float(row["ms_p80"]) - ms for ms, row in zip(times, case, strict=True)],
    ]
    colours = [OURS if name == "gkd" else PEER for name in names]
    bars = axes.barh(names, times, xerr=spread, color=colours, error_kw={"ecolor": TEXT, "elinewidth": 0.8})
    axes.bar_label(bars, [three_digits(ms) for ms in times], padding=6)
    axes.margins(x=0.12)
    axes.set_title(f"{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}", loc="left", fontsize=9)
    if floor:
        axes.axvline(floor, color=LINE, linestyle="--", linewidth=1.2)
        axes.set_title(f"- - {floor_name}: {three_digits(floor)} ms", loc="right", fontsize=8, color=LINE)
