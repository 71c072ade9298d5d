"""Measures all results again at a small size and holds the committed figures against them: make evidence

python benchmarks/evidence.py [--only RUN ...] [--minutes 30] [--out build/evidence]

Left in --out: results/ (as benchmarks/results), tables.md and plots/ made of them, claims.md (claim, committed, now,
margin, holds), and the log of each run. A run that fails, hangs or finds no time left is reported, and the others go
on. The exit status is 1 if a run failed, if a figure of README or docs is not that of its file, or if one does not hold
against the new ones. Small sizes, few rounds and a busy machine make rough figures: nothing here is to be kept.
Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import claims
from judging import table

ROOT = Path(__file__).parents[1]
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
    status: str  # "ok", or what went wrong
    seconds: float


def main() -> int:
    options = arguments()
    until_s = time.monotonic() + 60 * options.minutes
    out: Path = options.out.absolute()
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    wrong = claims.stale(ROOT, claims.RESULTS)
    for line in wrong:
        say(line)

    with tempfile.TemporaryDirectory(prefix="gkd_evidence_") as work:
        chosen = [run for run in runs(results, Path(work)) if not options.only or run.name in options.only]
        outcomes = [*run_all(chosen, out, until_s - LAST_WORDS_S), *pages(out)]

    verdicts = claims.compared(claims.RESULTS, results, {run.name for run in chosen})
    (out / "claims.md").write_text(table(verdicts) + "\n", encoding="utf-8")
    say(table(verdicts))
    wrong += [str(one) for one in verdicts if one.holds is False]
    wrong += [
        f"{one.name}: {one.status}; its log: {out / 'logs' / one.name}.txt" for one in outcomes if one.status != "ok"
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
    quickstart = [
        [sys.executable, "-m", "gkd", "train", "configs/quickstart.yaml", f"run.dir={work / 'quickstart'}",
         "run.steps=10"],
        [sys.executable, "benchmarks/record_run.py", work / "quickstart", results / "quickstart.json"],
    ]  # fmt: skip
    shapes = [sys.executable, "benchmarks/divergence_shapes.py", results.parent / "plots"]

    def script(name: str, file: str, limit_s: int, options: str, *more: str | Path) -> Run:
        command = [sys.executable, f"benchmarks/{name}.py", *options.split(), *more, "--out", results / file]
        return Run(name, [command], file, limit_s)

    losses = "--device cpu --quick"
    linear = "--only torch_plain trl_chunked liger_chunked liger_chunked_compiled bare_gemms"
    return [
        Run("choosing", [shapes], None, 60),
        script(
            "divergence", "divergence_cpu.csv", 300,
            f"{losses} --works value+gradient --kinds forward_kl jsd --dtypes bfloat16 float32 --shapes 256x32000",
        ),
        script(
            "linear_divergence", "linear_divergence_cpu.csv", 240,
            f"{losses} --repeats 3 --shapes 256x576x576x49152 {linear}",
        ),
        Run("quickstart", quickstart, "quickstart.json", 480),
        script(
            "versus_trl", "versus_trl_cpu.json", 840,  # three rounds: their median outlives a slow minute
            "--no-trials --rounds 3 --steps 4 --batch 8 --new-tokens 24 --folder", work / "versus_trl",
        ),
        script(
            "teacher_scoring", "teacher_scoring_cpu.json", 300, "--sequences 4 --passes 3 --full-tokens 2"
        ),
        script(
            "packing", "packing_cpu.json", 240, "--batch 16 --max-new-tokens 160 --rounds 3 --work", work / "packing"
        ),
        script("gkd_table", "gkd_table_smoke.json", 300, "--size smoke --folder", work / "gkd_table"),
        script("scaling", "scaling_cpu.json", 300, "--quick --steps 3"),
        script(
            "overlap", "overlap_cpu.json", 480,  # a full-sized step: in a small one the sync is most of it
            "--steps 5 --rounds 1 --work", work / "overlap",
        ),
    ]  # fmt: skip


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
    status = "ok"
    with (logs / f"{run.name}.txt").open("w") as log:
        for command in run.commands:
            status = ended([str(part) for part in command], log, limit_s - (time.monotonic() - start_s))
            if status != "ok":
                break
    return Outcome(run.name, status, time.monotonic() - start_s)


def ended(command: list[str], log: TextIO, limit_s: float) -> str:
    """Says ok, or how it failed; at its limit the process is ended with all that it started."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(max(0.0, limit_s))
        return "ok" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        return "stopped at its limit"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def pages(out: Path) -> Iterator[Outcome]:
    """All tables and plots of the new results."""
    script: Command = [sys.executable, "benchmarks/tables.py", "--results", out / "results"]
    yield finished(Run("tables", [script], None, LAST_WORDS_S), out / "logs", LAST_WORDS_S)
    (out / "logs" / "tables.txt").replace(out / "tables.md")
    plots: Command = [*script, "--plots", out / "plots"]
    yield finished(Run("plots", [plots], None, LAST_WORDS_S), out / "logs", LAST_WORDS_S)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
