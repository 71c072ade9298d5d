"""Pictures of a record: accuracy against tokens, the grid of divergences and lambdas, and what additions bring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.style import LINE, OURS, PEER, TEXT, figure
from gkd.bench.differences import ACCURACIES, additions_beside, difference_of
from gkd.bench.methods import (
    FIXED_NEGATIVE,
    FORWARD,
    JSD,
    LAMBDAS,
    OBJECTIVES,
    REVERSE,
    SEQKD,
    SFT,
    SUPERVISED_KD,
    Method,
    gkd,
)
from gkd.bench.summary import CellResult, of, over_seeds, score

CURVES = {
    SFT.label: TEXT,
    SEQKD.label: "#a58fc9",
    SUPERVISED_KD.label: PEER,
    FIXED_NEGATIVE.label: LINE,
    gkd(FORWARD, 1.0).label: "#d9a62b",
    gkd(JSD, 1.0).label: "#5b9a68",
    gkd(REVERSE, 1.0).label: OURS,
}


def plots(record: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Writes both as SVG and returns the files."""
    curves, grid = folder / f"{name}_tokens.svg", folder / f"{name}_grid.svg"
    with figure(curves, rows=1, columns=1, size=(7, 4)) as (axes,):
        draw_curves(axes, record["cells"])
    with figure(grid, rows=1, columns=2, size=(7, 3.2), share_y=True) as panels:
        draw_grid(panels, record["cells"])
    return [curves, grid]


def differences_plot(record: dict[str, Any], name: str, folder: Path) -> Path:
    """Writes it as SVG and returns the file: each addition less what it stands beside, with its 95 % t-interval."""
    path, cells = folder / f"{name}_differences.svg", record["cells"]
    pairs = additions_beside(cells)
    with figure(path, rows=1, columns=2, size=(8.4, 0.26 * len(pairs) + 1.2), share_y=True) as panels:
        for axes, (accuracy, wanted) in zip(panels, ACCURACIES.items(), strict=True):
            for row, (label, beside) in enumerate(pairs.items()):
                found = difference_of(cells, label, beside, wanted)
                if found is not None:
                    spread = 100 * (found.half_width or 0.0)
                    axes.errorbar(100 * found.mean, row, xerr=spread, fmt="o", color=OURS, ecolor=TEXT, markersize=4)
            axes.axvline(0.0, color=LINE, linewidth=1.2)
            axes.set_yticks(range(len(pairs)), list(pairs))
            axes.set_ylim(len(pairs) - 0.5, -0.5)
            axes.set_title(f"{accuracy} accuracy, points", loc="left", fontsize=9)
    return path


def draw_curves(axes: Any, cells: Sequence[CellResult]) -> None:
    """Means over seeds, with the lowest and the highest seed around them."""
    for label, colour in CURVES.items():
        chosen = of(cells, label)
        if not chosen:
            continue
        points = list(zip(*(_points(cell) for cell in chosen), strict=False))  # by look, then by seed
        tokens = [statistics.fmean(point[0] for point in look) / 1000 for look in points]
        shares = [[100 * point[1] for point in look] for look in points]
        axes.plot(tokens, list(map(statistics.fmean, shares)), color=colour, label=label, marker=".", linewidth=1.4)
        axes.fill_between(tokens, list(map(min, shares)), list(map(max, shares)), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("trained tokens, thousands")
    axes.set_ylabel("greedy accuracy on held-out problems, %")
    axes.legend(frameon=False, fontsize=8)


def _points(cell: CellResult) -> list[tuple[float, float]]:
    """(trained tokens, mean greedy accuracy over tasks) at each look."""
    return [(look["tokens"], statistics.fmean(look["greedy"].values())) for look in cell["curve"]]


def draw_grid(panels: Sequence[Any], cells: Sequence[CellResult]) -> None:
    """Two heat maps: greedy and sampled accuracy, in percent."""
    seeds = {cell["seed"] for cell in of(cells, gkd(FORWARD, 0.5).label)}  # those of the whole grid
    known = [cell for cell in cells if cell["seed"] in seeds]
    for axes, name in zip(panels, ("greedy", "sampled"), strict=True):
        shares = [[_share(known, gkd(objective, share), name) for share in LAMBDAS] for objective in OBJECTIVES]
        axes.imshow(shares, cmap="Oranges", aspect="auto", alpha=0.8)
        for row, line in enumerate(shares):
            for column, value in enumerate(line):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="black")
        axes.set_xticks(range(len(LAMBDAS)), [f"λ = {share:g}" for share in LAMBDAS])
        axes.set_yticks(range(len(OBJECTIVES)), [objective.label for objective in OBJECTIVES])
        axes.set_title(f"{name} accuracy, %", loc="left", fontsize=9)
        axes.spines[:].set_visible(False)


def _share(cells: Sequence[CellResult], method: Method, name: str) -> float:
    """NaN where no cell is finished."""
    found = over_seeds(of(cells, method.label), score(name))
    return float("nan") if found is None else 100 * found.mean
