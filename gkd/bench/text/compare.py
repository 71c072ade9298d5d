"""The comparison on real text: from what is missing to the record.

One model is the teacher, and the student is some of its layers. Every method starts from that student; one run a method
and seed is read at two marks, equally many trained tokens and equally many seconds (`marks`). docs/text.md says what
came out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gkd.bench.machine import busy_note, measured_with
from gkd.bench.rows import columns
from gkd.bench.text import plan, tables
from gkd.bench.text.carried import carry_over, shared_by_runs
from gkd.bench.text.folder import Folder
from gkd.bench.text.sizes import Material, Size
from gkd.bench.work import Workers, run_stages
from gkd.errors import InputError
from gkd.extras import require_vllm
from gkd.files import write_json


def compare(
    size: Size,
    material: Material,
    *,
    folder: Path,
    part: plan.Part,
    out: Path | None,
    so_far: bool,
    continued: Path | None = None,
    say: Callable[[str], None],
) -> None:
    """Runs what is missing in `folder` of the part asked for, prints the tables of all that is there, and writes the
    record to `out` (default: into `folder`). `so_far`: runs nothing. `continued`: a record whose runs are taken over.

    Raises InputError for files of prompts that are not there, and where `so_far` finds nothing.
    """
    for option, path in (("--train", material.train), ("--heldout", material.heldout)):
        if not path.is_file():
            raise InputError(f"{option}: there is no file {path}; the default lies in a checkout of gkd")
    work = Folder(folder / size.name, size, material)
    out = out or folder / f"bench_text_{size.name}.json"
    if continued is not None:
        say(f"{carry_over(work, continued)} runs are taken over from {continued}")
    if not so_far:
        if size.engine == "vllm":
            require_vllm("gkd bench text", "which samples with it")
        say(f"results so far are kept in {work.root}")
        if part != "runs" and (note := busy_note()):
            say(note)
        # one process at a time, with all threads; each run in a new one, so that what it held is free again
        run_stages(Workers(1, say, threads=None, is_fresh=True), plan.stages(work, part))
    elif not plan.results(work):
        raise InputError(f"--so-far: no run is finished in {work.root}; start without it")
    record = recorded(work)
    write_json(out, record)
    show(record)
    say(f"written: {out}")


def recorded(folder: Folder) -> dict[str, Any]:
    """Every finished run and round of the timing, and what they were measured with."""
    return {
        "command": f"gkd bench text --size {folder.size.name}",
        **measured_with(),
        **plan.described(folder),
        **shared_by_runs(folder),
        "planned_runs": len(folder.size.cells()),
        "times": plan.times(folder),
        "runs": plan.results(folder),
    }


def show(record: dict[str, Any]) -> None:
    if record["runs"]:
        print(f"\nat equally many tokens\n{tables.caption(record)}\n")
        columns(tables.mark_rows(record, "tokens"))
        print()
        columns(tables.drift_rows(record))
    if record["times"]:
        print()
        columns(tables.time_rows(record))
    if record["runs"] and record["times"]:
        print("\nat equally many seconds\n")
        columns(tables.mark_rows(record, "seconds"))
    print(f"\n{tables.verdict(record)}\n")
