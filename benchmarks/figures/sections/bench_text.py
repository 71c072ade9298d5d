"""The comparison on real text, for docs/text.md: tables, and the picture of drift by position."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.style import COLOURS, LINE, TEXT, figure
from benchmarks.figures.sections.text import markdown, section
from gkd.bench.rows import Rows
from gkd.bench.text import tables
from gkd.bench.text.marks import readings

KIND = "bench_text"
_PANELS = {"on_teacher": "on the teacher's texts", "on_own": "on own samples"}
_COLOURS = (TEXT, *COLOURS[:-1], LINE, "#d9c02b", "#3f8f9b")


def _section(results: Path, make: Callable[[Record], Rows], is_timed: bool = False) -> str:
    """A table a record; of those that were timed alone, where it is about seconds."""
    found = (record for record in records(results, KIND).values() if record["times"] or not is_timed)
    return section(markdown(header, lines) for header, *lines in map(make, found))


def _verdict_section(results: Path) -> str:
    found = records(results, KIND).values()
    return section(f"{tables.caption(record)}\n\n{tables.verdict(record)}" for record in found)


def _drift_section(results: Path) -> str:
    """The picture of each record over its table."""
    return section(
        f"![JSD by place in the text, on the teacher's texts and on own samples](plots/{name}_drift.svg)\n\n"
        + markdown(rows[0], rows[1:])
        for name, record in records(results, KIND).items()
        for rows in [tables.drift_rows(record)]
    )


BENCH_TEXT_SECTIONS: dict[str, Callable[[Path], str]] = {
    "bench_text-verdict": _verdict_section,
    "bench_text": partial(_section, make=partial(tables.mark_rows, mark="tokens")),
    "bench_text-seconds": partial(_section, make=partial(tables.mark_rows, mark="seconds"), is_timed=True),
    "bench_text-times": partial(_section, make=tables.time_rows, is_timed=True),
    "bench_text-drift": _drift_section,
}


def drift_plot(record: Record, name: str, folder: Path) -> Path:
    """Means over seeds at the tokens' mark, on the teacher's texts and on own samples."""
    path = folder / f"{name}_drift.svg"
    colours = dict(zip(tables.labels(record), itertools.cycle(_COLOURS), strict=False))
    with figure(path, rows=1, columns=2, size=(8.4, 3.6), share_y=True) as panels:
        for axes, (texts, title) in zip(panels, _PANELS.items(), strict=True):
            for label, colour in colours.items():
                ends, values = _by_place([one.look["positions"][texts] for one in readings(record, label, "tokens")])
                axes.plot(ends, values, color=colour, linewidth=1.4, label=label)
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("tokens of the completion so far")
        panels[0].set_ylabel("JSD, nats a token")
        panels[1].legend(frameon=False, fontsize=7)
    return path


def _by_place(positions: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Of the readings of a method: where each group of places ends, and its mean over seeds."""
    groups = zip(*(one[tables.DRIFT] for one in positions), strict=False)  # texts of some seeds may all be shorter
    values = [statistics.fmean(group) for group in groups]
    return [(place + 1) * positions[0]["bucket_tokens"] for place in range(len(values))], values
