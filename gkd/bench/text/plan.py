"""What a comparison consists of: first what runs have in common, then the timing, then the runs; each a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from gkd.bench.kept import kept_result, read_json
from gkd.bench.machine import burden
from gkd.bench.options import named
from gkd.bench.text.folder import Folder
from gkd.bench.text.methods import Cell, Method
from gkd.bench.work import Job
from gkd.environment import prepare_process
from gkd.files import write_json

Part = Literal["all", "runs", "times"]
PARTS: tuple[Part, ...] = get_args(Part)
TEXTS = "the teacher's texts"
_START_COST = 0.2  # of a run that trains nothing, in runs of an on-policy method: for the time that is left


def stages(folder: Folder, part: Part) -> Iterator[Sequence[Job]]:
    yield [Job("the student", folder.student, _make_student, (folder,))]
    yield [Job("the teacher's held-out texts", folder.teacher_texts, _write_teacher_texts, (folder,))]
    if part != "runs":
        yield time_jobs(folder)
    if part != "times":
        yield cell_jobs(folder)


def time_jobs(folder: Folder) -> list[Job]:
    """Round by round each method once: a machine whose speed wanders favours none."""
    jobs: list[Job] = []
    for index in range(folder.size.rounds):
        round_label = f"round {index + 1}"
        jobs.append(Job(f"{round_label}, {TEXTS}", folder.text_times(index), _time_texts, (folder, index)))
        for method in folder.size.methods:
            target = folder.times(method, index)
            jobs.append(Job(f"{round_label}, {method.label}", target, _time_method, (folder, method, index)))
    return jobs


def cell_jobs(folder: Folder) -> list[Job]:
    return [
        Job(
            f"{cell.method.label}, seed {cell.seed}",
            folder.result(cell),
            _run_cell,
            (folder, cell),
            cost=_START_COST + (cell.method.longer > 0),
        )
        for cell in folder.size.cells()
    ]


def part_named(name: str) -> Part:
    """Raises InputError."""
    return named({part: part for part in PARTS}, name, "--part")


# ---- what workers do: in processes that load torch only here


def _make_student(folder: Folder) -> str:
    prepare_process()
    from gkd.bench.text.prepare import make_student

    return make_student(folder)


def _write_teacher_texts(folder: Folder) -> str:
    prepare_process()
    from gkd.bench.text.prepare import write_teacher_texts

    return write_teacher_texts(folder)


def _time_texts(folder: Folder, index: int) -> str:
    prepare_process()
    from gkd.bench.text.prepare import time_texts

    found = _burdened(folder.text_times(index), lambda: time_texts(folder))
    return f"{found['text_s']:.2f} s a text"


def _time_method(folder: Folder, method: Method, index: int) -> str:
    prepare_process()
    from gkd.bench.text.cell import time_steps

    found = _burdened(folder.times(method, index), lambda: {"steps": time_steps(folder, method, index)})
    return f"{min(step['all'] for step in found['steps']):.2f} s for the fastest step"


def _burdened(target: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Writes what was measured, with what else the machine did meanwhile."""
    with burden() as found:
        measured = measure()
    write_json(target, {**measured, "machine": found})
    return measured


def _run_cell(folder: Folder, cell: Cell) -> str:
    prepare_process()
    from gkd.bench.text.cell import run_cell

    done = kept_result(folder.result(cell), lambda: run_cell(folder, cell))
    if "failed" in done:
        return done["failed"]
    return f"{done['looks'][-1]['on_teacher']['forward_kl']:.3f} nats, {done['seconds']['all']:.0f} s"


# ---- results


def run_key(cell: Cell) -> tuple[str, int]:
    """What a record calls a run by."""
    return cell.method.label, cell.seed


def results(folder: Folder) -> list[dict[str, Any]]:
    """All runs that there are, in the order of the plan."""
    return [
        dict(zip(("method", "seed"), run_key(cell), strict=True)) | read_json(folder.result(cell))
        for cell in folder.size.cells()
        if folder.result(cell).exists()
    ]


def times(folder: Folder) -> list[dict[str, Any]]:
    """All rounds of which everything is there."""
    found: list[dict[str, Any]] = []
    for index in range(folder.size.rounds):
        files = {method.label: folder.times(method, index) for method in folder.size.methods}
        files[TEXTS] = folder.text_times(index)
        if all(file.exists() for file in files.values()):
            found.append({label: read_json(file) for label, file in files.items()})
    return found


def described(folder: Folder) -> dict[str, Any]:
    """What a record says of the work."""
    size, material = folder.size, folder.material
    methods = [{**asdict(method), "tokens": size.tokens(method)} for method in size.methods]
    prompts = {"train": str(material.train), "heldout": str(material.heldout)}
    return {"size": {**asdict(size), "methods": methods}, "teacher": material.teacher, "prompts": prompts}
