"""How time and memory of a step grow, measured and planned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.style import COLOURS, figure
from benchmarks.figures.sections.text import markdown, section, three_digits

AXES = {
    "batch_size": "sequences a step",
    "max_new_tokens": "new tokens a sequence",
    "vocabulary": "vocabulary",
    "ranks": "ranks",
}


def scaling_section(results: Path) -> str:
    """Growth exponents, a line an axis: measured, and in brackets planned. The plot is in plots/ beside the page."""
    parts = []
    for name, record in records(results, "scaling").items():
        phases = list(next(iter(record["exponents"].values())))
        lines = [
            [AXES[axis], span(record, axis), *(exponent(found[phase]) for phase in phases)]
            for axis, found in record["exponents"].items()
        ]
        parts += [
            f"{record['device']}, {record['threads']} thread a rank, {record['sampler']} sampler; medians of "
            f"{record['steps']} steps without the first.  \n{record['versions']}.",
            markdown(["", "from – to", *phases], lines),
            f"![seconds of a step's phases against each size, measured and planned](plots/{name}.svg)",
        ]
    return section(parts)


def span(record: Record, axis: str) -> str:
    values = [point["value"] for point in record["points"] if point["axis"] == axis]
    return f"{min(values)} – {max(values)}"


def exponent(found: dict[str, float]) -> str:
    return f"{found['measured']:.2f} ({found['planned']:.2f})"


def scaling_plots(results: Path, folder: Path) -> list[Path]:
    """One SVG a record, a panel an axis, both scales logarithmic. Returns the files."""
    made = []
    for name, record in records(results, "scaling").items():
        path = folder / f"{name}.svg"
        axes = list(dict.fromkeys(point["axis"] for point in record["points"]))
        with figure(path, rows=-(-len(axes) // 2), columns=2, size=(7, 2.8 * -(-len(axes) // 2))) as panels:
            for panel, axis in itertools.zip_longest(panels, axes):
                if axis is None:
                    panel.set_visible(False)
                else:
                    draw(panel, axis, [point for point in record["points"] if point["axis"] == axis])
            legend = panels[0].legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(-0.1, 1.0))
            legend.set_in_layout(False)  # it is wider than its panel
            panels[1].set_title("dashes: planned", loc="right", fontsize=8)
        made.append(path)
    return made


def draw(panel: Any, axis: str, points: Sequence[Record]) -> None:
    """Seconds of each phase: dots and lines measured, dashes planned."""
    values = [point["value"] for point in points]
    for phase, colour in zip(points[0]["seconds"], COLOURS, strict=False):
        measured, planned = ([point[kind][phase] for point in points] for kind in ("seconds", "planned_seconds"))
        panel.plot(values, measured, color=colour, marker="o", markersize=3, linewidth=1.4, label=phase)
        panel.plot(values, planned, color=colour, linestyle="--", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [three_digits(value) if value < 1000 else str(value) for value in values])
    panel.minorticks_off()
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel("s a step")
