"""The comparison on real text, for docs/text.md: tables, and the picture of drift by position."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.style import COLOURS, LINE, figure
from benchmarks.figures.sections.text import markdown, section
from gkd.bench.rows import Rows
from gkd.bench.text import tables
from gkd.bench.text.marks import readings

KIND = "bench_text"
DASHED = "--"


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
    """Means over seeds at the tokens' mark: lines are on own samples, dashes on the teacher's texts."""
    path = folder / f"{name}_drift.svg"
    with figure(path, rows=1, columns=1, size=(7, 4)) as (axes,):
        for label, colour in zip(tables.labels(record), itertools.cycle((*COLOURS, LINE, "#d9c02b", "#3f8f9b"))):
            found = [reading.look["positions"] for reading in readings(record, label, "tokens")]
            for texts, style in (("on_own", "-"), ("on_teacher", DASHED)):
                # texts of some seeds may all be shorter
                groups = zip(*(one[texts][tables.DRIFT] for one in found), strict=False)
                values = [statistics.fmean(group) for group in groups]
                ends = [(place + 1) * found[0][texts]["bucket_tokens"] for place in range(len(values))]
                axes.plot(ends, values, style, color=colour, linewidth=1.4, label=label if style == "-" else None)
        axes.set_xlabel("tokens of the completion so far")
        axes.set_ylabel("JSD, nats a token")
        axes.legend(frameon=False, fontsize=7)
    return path
