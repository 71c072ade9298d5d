"""How a plot looks: readable on white and on black, and equal files for equal data."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS, PEER, LINE, TEXT = "#d9822b", "#6f8fb3", "#c4504a", "#7a7a7a"
COLOURS = (OURS, PEER, "#5b9a68", "#a58fc9", TEXT)


@contextmanager
def figure(
    path: Path,
    *,
    rows: int,
    columns: int,
    size: tuple[float, float],
    height_ratios: Sequence[float] | None = None,
    share_x: bool = False,
    share_y: bool = False,
) -> Iterator[Sequence[Any]]:
    """The panels of a figure, row by row, which is written to `path` at the end. Needs matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    style = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    style |= {"axes.edgecolor": TEXT, "svg.hashsalt": path.stem, "font.size": 9}
    with matplotlib.rc_context(style):
        drawn, grid = pyplot.subplots(
            rows, columns, figsize=size, height_ratios=height_ratios, sharex=share_x, sharey=share_y, squeeze=False
        )
        for panel in grid.flat:
            panel.spines[["top", "right"]].set_visible(False)
        yield list(grid.flat)
        drawn.tight_layout()
        drawn.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(drawn)
