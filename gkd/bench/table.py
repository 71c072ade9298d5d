"""The comparison of the GKD paper (arXiv 2306.13649) at a size for two cores, and what more than it may bring.

A teacher is trained from scratch on four kinds of problems that a program checks, students several times smaller get a
short supervised phase, and then every method goes on from the same students with the same number of trained tokens:
supervised fine-tuning, SeqKD, supervised KD, and GKD with six divergences at three shares of the student's own samples;
besides, other temperatures, two controls, and a sweep over what the outcome may hang on. `additions` are the engine's
other ways to distil, each beside the method without it. docs/table.md says what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkd.bench import plan
from gkd.bench.kept import read_json
from gkd.bench.machine import measured_with
from gkd.bench.parts import Part
from gkd.bench.show import show, write_csv
from gkd.bench.sizes import Size
from gkd.bench.work import Workers, run_stages
from gkd.errors import InputError
from gkd.files import write_json


def make_table(
    size: Size, *, part: Part, workers: int, folder: Path, out: Path | None, so_far: bool, say: Callable[[str], None]
) -> None:
    """Runs what is missing of a part in `folder`, which a table that was cut off goes on from; prints the tables, and
    writes the record, a JSON and a CSV beside it, to `out` (default: into `folder`). `so_far`: runs nothing.

    Raises InputError where `so_far` finds nothing.
    """
    chosen = part.settings(folder / size.name, size)
    out = out or folder / f"{part.record}_{size.name}.json"
    if not so_far:
        say(f"results so far are kept in {folder / size.name}")
        stages = (jobs(chosen) for jobs in (plan.start_jobs, plan.text_jobs, plan.cell_jobs))
        run_stages(Workers(workers, say), stages)
    elif not chosen[0].folder.teacher_texts.exists():
        raise InputError(f"--so-far: nothing is finished in {folder / size.name}; start without it")
    record = recorded(size, part, chosen)
    write_json(out, record)
    write_csv(out.with_suffix(".csv"), record)
    show(record, part)
    say(f"written: {out} and {out.with_suffix('.csv').name}")


def recorded(size: Size, part: Part, chosen: list[plan.Setting]) -> dict[str, Any]:
    """Every finished cell, and what it was measured with."""
    from gkd.bench.models import make_model, parameters  # torch loads here, and not before: workers set its threads

    texts, cells = read_json(chosen[0].folder.teacher_texts), plan.results(chosen)
    return {
        "command": f"gkd bench table --part {part.name} --size {size.name}",
        **measured_with(),
        "size": asdict(size),
        "parameters": {
            name: parameters(make_model(getattr(size, name), 0)) for name in ("teacher", "assistant", "student")
        },
        "teacher": {figure: texts[figure] for figure in ("greedy", "sampled")},
        "planned_cells": sum(len(setting.cells) for setting in chosen),
        "cell_seconds": sum(cell["seconds"]["all"] for cell in cells if "seconds" in cell),
        "cells": cells,
    }
