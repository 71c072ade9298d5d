"""The comparison of the GKD paper (arXiv 2306.13649) at a size for two cores: python benchmarks/gkd_table.py

A teacher is trained from scratch on four kinds of problems that a program checks, students several times smaller get a
short supervised phase, and then every method goes on from the same students with the same number of trained tokens:
supervised fine-tuning, SeqKD, supervised KD, and GKD with six divergences at three shares of the student's own samples;
besides, other temperatures, two controls, and a sweep over what the outcome may hang on. docs/table.md says what came
out.

Started again, the command goes on where it was cut off. The gpu size has not been run yet.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from table import plan
from table.folder import read_json, write_json
from table.show import show, write_csv
from table.sizes import SIZES, Size
from table.work import Workers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    options = parsed()
    size = SIZES[options.size]
    chosen = plan.settings(options.folder / size.name, size)
    out = options.out or (options.folder if size.name == "smoke" else RESULTS) / f"gkd_table_{size.name}.json"
    say(f"results so far are kept in {options.folder / size.name}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped; the same command goes on from here"))
    if not options.so_far:
        try:
            with Workers(options.workers, say) as workers:
                for jobs in (plan.start_jobs, plan.text_jobs, plan.cell_jobs):
                    workers.run(jobs(chosen))
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on from here")
    elif not chosen[0].folder.teacher_texts.exists():
        sys.exit(f"--so-far: nothing is finished in {options.folder / size.name}")
    record = recorded(size, chosen)
    write_json(out, record)
    write_csv(out.with_suffix(".csv"), record)
    show(record)
    say(f"written: {out} and {out.with_suffix('.csv').name}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu", help="smoke: whether it works, and no figures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="the JSON; the CSV goes beside it. Default: among the results")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gkd_table", help="what is made on the way")
    parser.add_argument("--so-far", action="store_true", help="run nothing; make the tables of what is finished")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers: at least 1")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out: {options.out} does not end in .json")
    return options


def recorded(size: Size, chosen: list[plan.Setting]) -> dict[str, Any]:
    """Every finished cell, and what it was measured with."""
    from measure import environment  # loads torch
    from table.models import make_model, parameters

    texts, cells, found = read_json(chosen[0].folder.teacher_texts), plan.results(chosen), environment(device_kind())
    return {
        "command": f"gkd bench table --size {size.name}",
        "device": found["device"],
        "versions": found["versions"],
        "size": asdict(size),
        "parameters": {name: parameters(make_model(getattr(size, name), 0)) for name in ("teacher", "student")},
        "teacher": {figure: texts[figure] for figure in ("greedy", "sampled")},
        "planned_cells": sum(len(plan.cells_of(setting)) for setting in chosen),
        "cell_seconds": sum(cell["seconds"]["all"] for cell in cells if "seconds" in cell),
        "cells": cells,
    }


def device_kind() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
