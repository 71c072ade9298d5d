"""Measures all results again at a small size and holds the committed figures against them: make evidence

python -m benchmarks.figures.evidence [--only RUN ...] [--minutes 30] [--out build/evidence]

Left in --out: results/ (as benchmarks/results), tables.md and plots/ made of them, claims.md (claim, committed, now,
margin, holds), and the log of each run. A run that fails, hangs or finds no time left is reported, and the others go
on. The exit status is 1 if a run failed, if a figure of README or docs is not that of its file, or if one does not hold
against the new ones. Small sizes, few rounds and a busy machine make rough figures: nothing here is to be kept.
Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import claims
from benchmarks.figures.judging import table
from benchmarks.processes import OK, ended
from benchmarks.records import RESULTS, ROOT, say

LOSSES = "--device cpu --quick"
LAST_WORDS_S = 60  # kept for tables, plots and the verdict
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Run:
    """Processes one after another, what they write in results/, and how long they may take."""

    name: str
    commands: Sequence[Command]
    makes: str | None
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # OK, or what went wrong
    seconds: float


def main() -> int:
    options = arguments()
    until_s = time.monotonic() + 60 * options.minutes
    out: Path = options.out.absolute()
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    wrong = claims.stale(ROOT, RESULTS)
    for line in wrong:
        say(line)

    with tempfile.TemporaryDirectory(prefix="gkd_evidence_") as work:
        chosen = [run for run in runs(results, Path(work)) if not options.only or run.name in options.only]
        outcomes = [*run_all(chosen, out, until_s - LAST_WORDS_S), *pages(out)]

    verdicts = claims.compared(RESULTS, results, {run.name for run in chosen})
    (out / "claims.md").write_text(table(verdicts) + "\n", encoding="utf-8")
    say(table(verdicts))
    wrong += [str(one) for one in verdicts if one.holds is False]
    wrong += [
        f"{one.name}: {one.status}; its log: {out / 'logs' / one.name}.txt" for one in outcomes if one.status != OK
    ]
    holding = sum(one.holds is True for one in verdicts)
    say(f"{holding} figures hold, {len(wrong)} wrong, in {sum(one.seconds for one in outcomes) / 60:.1f} min; {out}")
    for line in wrong:
        say(f"WRONG  {line}")
    return int(bool(wrong))


def arguments() -> argparse.Namespace:
    names = [run.name for run in runs(Path(), Path())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="RUN", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "evidence")
    return parser.parse_args()


def runs(results: Path, work: Path) -> list[Run]:
    """In this order: if time runs out, the last are left out."""

    def small(name: str, file: str, limit_s: int, command: str, *more: str | Path) -> Run:
        return Run(name, [module(command, *more, "--out", results / file)], file, limit_s)

    quickstart = [
        module("gkd train configs/quickstart.yaml", f"run.dir={work / 'quickstart'}", "run.steps=10"),
        module("benchmarks.runs.record", work / "quickstart", results / "quickstart.json"),
    ]
    return [
        Run("choosing", [module("benchmarks.figures.choosing", results.parent / "plots")], None, 60),
        small("divergence", "divergence_cpu.csv", 300, f"benchmarks.losses.divergence {LOSSES} --works value+gradient "
              "--kinds forward_kl jsd --dtypes bfloat16 float32 --shapes 256x32000"),
        small("linear_divergence", "linear_divergence_cpu.csv", 240, f"benchmarks.losses.linear_divergence {LOSSES} "
              "--repeats 3 --shapes 256x576x576x49152 "
              "--only torch_plain trl_chunked liger_chunked liger_chunked_compiled bare_gemms"),
        Run("quickstart", quickstart, "quickstart.json", 480),
        small("cut", "cut_cpu.json", 300, "benchmarks.runs.cut --work", work / "cut"),
        # three rounds: their median outlives a slow minute
        small("versus_trl", "versus_trl_cpu.json", 840, "benchmarks.runs.versus_trl --no-trials --same-seconds 0 "
              "--rounds 3 --steps 4 --batch 8 --new-tokens 24 --folder", work / "versus_trl"),
        small("teacher_scoring", "teacher_scoring_cpu.json", 300,
              "benchmarks.runs.teacher_scoring --sequences 4 --passes 3 --full-tokens 2"),
        small("packing", "packing_cpu.json", 240,
              "benchmarks.runs.packing --batch 16 --max-new-tokens 160 --rounds 3 --work", work / "packing"),
        small("gkd_table", "gkd_table_smoke.json", 300, "gkd bench table --size smoke --folder", work / "gkd_table"),
        small("gkd_additions", "gkd_additions_smoke.json", 240,
              "gkd bench table --part additions --size smoke --folder", work / "gkd_table"),
        small("author", "author_cpu.json", 120, "benchmarks.runs.author --rows 2000"),
        small("scaling", "scaling_cpu.json", 300, "benchmarks.runs.scaling --quick --steps 3"),
        # a full-sized step: in a small one the sync is most of it
        small("overlap", "overlap_cpu.json", 480,
              "benchmarks.runs.overlap --steps 5 --rounds 1 --work", work / "overlap"),
        small("bench_text", "bench_text_small.json", 480, "gkd bench text --size small --folder", work / "bench_text"),
    ]  # fmt: skip


def module(command: str, *more: str | Path) -> Command:
    """A module of Python with its arguments."""
    return [sys.executable, "-m", *command.split(), *more]


def run_all(chosen: Sequence[Run], out: Path, until_s: float) -> Iterator[Outcome]:
    """One after another, each within its limit and what is left of all."""
    for index, run in enumerate(chosen, 1):
        if run.makes:
            (out / "results" / run.makes).unlink(missing_ok=True)  # an earlier evidence's
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            outcome = Outcome(run.name, "no time was left", 0.0)
        else:
            say(f"[{index}/{len(chosen)}] {run.name}: at most {run.limit_s / 60:.0f} min; {left_s / 60:.0f} min left")
            outcome = finished(run, out / "logs", min(run.limit_s, left_s))
        say(f"    {outcome.status}, {outcome.seconds:.0f} s")
        yield outcome


def finished(run: Run, logs: Path, limit_s: float) -> Outcome:
    """Runs its commands until one fails, with their output in a log."""
    logs.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    status = OK
    with (logs / f"{run.name}.txt").open("w") as log:
        for command in run.commands:
            status = ended(command, log, limit_s - (time.monotonic() - start_s))
            if status != OK:
                break
    return Outcome(run.name, status, time.monotonic() - start_s)


def pages(out: Path) -> Iterator[Outcome]:
    """All tables and plots of the new results."""
    script = module("benchmarks.figures.tables --results", out / "results")
    yield finished(Run("tables", [script], None, LAST_WORDS_S), out / "logs", LAST_WORDS_S)
    (out / "logs" / "tables.txt").replace(out / "tables.md")
    plots: Command = [*script, "--plots", out / "plots"]
    yield finished(Run("plots", [plots], None, LAST_WORDS_S), out / "logs", LAST_WORDS_S)


if __name__ == "__main__":
    sys.exit(main())
