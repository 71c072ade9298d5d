"""Makes tables and plots of the results, as `make tables` does for all pages:

    python -m benchmarks.figures.tables [--write FILE ...] [--check FILE ...] [--plots FOLDER]

A file says where a table goes: what stands between the lines <!-- begin: NAME --> and <!-- end: NAME --> is replaced.
The names are divergence (medians of value and gradient, one line a shape), divergence-full (a table for each case),
linear_divergence, terms, before_and_after, versus_trl (whole runs), versus_trl-profile (a step of gkd), quickstart,
cut, narrow, shape, packing, teacher_scoring, overlap, scaling, gkd_table, gkd_table-tasks, -grid, -temperature,
-ratios, -sweep and -verdict, gkd_additions, gkd_additions-tasks, -differences and -verdict (docs/table.md), bench_text,
bench_text-seconds, -times, -drift and -verdict (docs/text.md), and plan-links, -phases, -overlap, -limits, -verdicts,
-errors and -error-sentence (docs/scaling.md; all but the errors are what the planner says today).
Every CSV or JSON in benchmarks/results/ whose name begins so is part of it. --check changes nothing and fails if a
file is not what --write would make of it. --plots needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures.sections.bench_text import BENCH_TEXT_SECTIONS
from benchmarks.figures.sections.cut import cut_section
from benchmarks.figures.sections.gkd_table import GKD_TABLE_SECTIONS
from benchmarks.figures.sections.losses import divergence_section, full_section
from benchmarks.figures.sections.narrow import narrow_section
from benchmarks.figures.sections.overlap import overlap_section
from benchmarks.figures.sections.packing import packing_section
from benchmarks.figures.sections.planner import PLANNER_SECTIONS
from benchmarks.figures.sections.plots import plots
from benchmarks.figures.sections.quickstart import quickstart_section
from benchmarks.figures.sections.scaling import scaling_section
from benchmarks.figures.sections.shape import shape_section
from benchmarks.figures.sections.teacher_scoring import teacher_scoring_section
from benchmarks.figures.sections.terms import before_and_after_section, terms_section
from benchmarks.figures.sections.versus_trl import versus_trl_profile_section, versus_trl_section
from benchmarks.records import RESULTS

SECTIONS: dict[str, Callable[[Path], str]] = {
    "quickstart": quickstart_section,
    "cut": cut_section,
    "versus_trl": versus_trl_section,
    "versus_trl-profile": versus_trl_profile_section,
    "narrow": narrow_section,
    "shape": shape_section,
    "packing": packing_section,
    "divergence": divergence_section,
    "divergence-full": lambda results: full_section("divergence", results),
    "linear_divergence": lambda results: full_section("linear_divergence", results),
    "terms": terms_section,
    "before_and_after": before_and_after_section,
    "teacher_scoring": teacher_scoring_section,
    "overlap": overlap_section,
    "scaling": scaling_section,
    **GKD_TABLE_SECTIONS,
    **BENCH_TEXT_SECTIONS,
    **PLANNER_SECTIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for file in options.write:
        file.write_text(filled(file, options.results))
    stale = [str(file) for file in options.check if file.read_text() != filled(file, options.results)]
    if stale:
        sys.exit(f"not what the results say: {', '.join(stale)}; run make tables")
    if options.plots:
        for path in plots(options.results, options.plots):
            print(path)
    if not (options.write or options.check or options.plots):
        print("\n\n".join(f"## {name}\n\n{make(options.results)}" for name, make in SECTIONS.items()))


def filled(file: Path, results: Path) -> str:
    """The file's text with every section made anew."""
    text = file.read_text()
    names = re.findall(r"^<!-- begin: (.+?) -->$", text, flags=re.MULTILINE)
    if not names:
        sys.exit(f"{file} has no line <!-- begin: NAME -->")
    for name in names:
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if name not in SECTIONS or end not in text:
            sys.exit(f"{file}: {name!r} has no end or is none of {', '.join(SECTIONS)}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}{SECTIONS[name](results)}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    main()
