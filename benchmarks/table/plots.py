"""Pictures of a record: accuracy against trained tokens, and the grid of divergences and lambdas."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import FIXED_NEGATIVE, FORWARD, GRID, JSD, LAMBDAS, OBJECTIVES, REVERSE, SEQKD, SFT, SUPERVISED_KD, gkd
from .summary import CellResult, of, over_seeds, score

TEXT = "#7a7a7a"  # readable on white and on black, as the colours below
CURVES = {
    SFT.label: "#7a7a7a",
    SEQKD.label: "#a58fc9",
    SUPERVISED_KD.label: "#6f8fb3",
    FIXED_NEGATIVE.label: "#c4504a",
    gkd(FORWARD, 1.0).label: "#d9a62b",
    gkd(JSD, 1.0).label: "#5b9a68",
    gkd(REVERSE, 1.0).label: "#d9822b",
}


def plots(record: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Writes both as SVG and returns the files."""
    return [
        _save(folder / f"{name}_tokens.svg", lambda pyplot: _curves(pyplot, record["cells"])),
        _save(folder / f"{name}_grid.svg", lambda pyplot: _grid(pyplot, record["cells"])),
    ]


def _save(path: Path, draw: Any) -> Path:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    style = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    style |= {"axes.edgecolor": TEXT, "svg.hashsalt": path.stem, "font.size": 9}  # the salt: equal files for equal data
    with matplotlib.rc_context(style):
        figure = draw(pyplot)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return path


def _curves(pyplot: Any, cells: Sequence[CellResult]) -> Any:
    """Means over seeds, with the lowest and the highest seed around them."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _points(cell: CellResult) -> list[tuple[float, float]]:
    """(trained tokens, mean greedy accuracy over tasks) at each look."""
    return [(look["tokens"], statistics.fmean(look["greedy"].values())) for look in cell["curve"]]


def _grid(pyplot: Any, cells: Sequence[CellResult]) -> Any:
    """Two heat maps: greedy and sampled accuracy, in percent."""
    figure, panels = pyplot.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    seeds = {cell["seed"] for cell in of(cells, gkd(FORWARD, 0.5).label)}  # those of the whole grid
    known = [cell for cell in cells if cell["seed"] in seeds]
    for axes, name in zip(panels, ("greedy", "sampled"), strict=True):
        shares = [[_share(known, objective.label, share, name) for share in LAMBDAS] for objective in OBJECTIVES]
        axes.imshow(shares, cmap="Oranges", aspect="auto", alpha=0.8)
        for row, line in enumerate(shares):
            for column, value in enumerate(line):
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="black")
        axes.set_xticks(range(len(LAMBDAS)), [f"λ = {share:g}" for share in LAMBDAS])
        axes.set_yticks(range(len(OBJECTIVES)), [objective.label for objective in OBJECTIVES])
        axes.set_title(f"{name} accuracy, %", loc="left", fontsize=9)
        axes.spines[:].set_visible(False)
    return figure


def _share(cells: Sequence[CellResult], objective: str, share: float, name: str) -> float:
    """NaN where no cell is finished."""
    label = next(m.label for m in GRID if m.objective.label == objective and m.student_share == share)
    found = over_seeds(of(cells, label), score(name))
    return float("nan") if found is None else 100 * found.mean
