"""What a table consists of: first what the cells start from, then the cells, each a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gkd.bench import additions, methods
from gkd.bench.folder import Folder
from gkd.bench.kept import kept_result, read_json
from gkd.bench.methods import SWEPT, Cell
from gkd.bench.sizes import Size
from gkd.bench.work import Job
from gkd.config import Launch
from gkd.environment import prepare_process

AS_IT_STANDS = ""  # the setting of the table itself
_STEP_COST = 2e-3  # of a step of a student's supervised phase, in cells of the same size: for the time that is left


@dataclass(frozen=True)
class Setting:
    """A size under a name: the table's own, or one in which a single thing is varied."""

    name: str
    folder: Folder
    cells: Sequence[Cell]

    @property
    def size(self) -> Size:
        return self.folder.size

    @property
    def seeds(self) -> Sequence[int]:
        return sorted({cell.seed for cell in self.cells})


def divergences(root: Path, size: Size) -> list[Setting]:
    """The table's own first, then those of the sweep."""
    varied: dict[str, Size] = {}
    for count in size.swept_train_problems:
        varied[f"{count} train problems a task"] = replace(size, train_problems=count)
    for steps in size.swept_schooling_steps:
        schooling = replace(size.student_schooling, steps=steps)
        varied[f"{steps} supervised steps before"] = replace(size, student_schooling=schooling)
    swept = [Cell(method, seed) for seed in range(size.seeds) for method in SWEPT]
    own = Setting(AS_IT_STANDS, Folder(root, size), methods.cells(size))
    return [own, *(Setting(name, Folder(root, changed), swept) for name, changed in varied.items())]


def added(root: Path, size: Size) -> list[Setting]:
    """The table's own alone."""
    return [Setting(AS_IT_STANDS, Folder(root, size), additions.cells(size))]


# ---- jobs


def start_jobs(chosen: Sequence[Setting]) -> list[Job]:
    """The teacher, which takes longest, and what students start from."""
    folder = chosen[0].folder
    jobs = [Job("teacher", folder.teacher, _make_teacher, (folder,), cost=_teacher_cost(folder.size))]
    for setting in chosen:
        cost = setting.size.student_schooling.steps * _STEP_COST
        learners = {"student": setting.folder}
        if any(cell.method.through_assistant for cell in setting.cells):
            learners["assistant"] = setting.folder.assistant
        for seed in setting.seeds:
            for name, own in learners.items():
                label = _named(setting, f"{name} {seed}")
                jobs.append(Job(label, own.student(seed), _make_student, (own, seed), cost))
    return list({job.target: job for job in jobs}.values())


def text_jobs(chosen: Sequence[Setting]) -> list[Job]:
    """What the teacher writes."""
    jobs = []
    for setting in chosen:
        folder = setting.folder
        jobs.append(Job("the teacher's held-out texts", folder.teacher_texts, _write_teacher_texts, (folder,)))
        for seed in setting.seeds:
            target = folder.train_file(seed, "teacher_greedy")  # the last of the three that is written
            jobs.append(Job(_named(setting, f"train data {seed}"), target, _write_train_files, (folder, seed)))
    return list({job.target: job for job in jobs}.values())


def cell_jobs(chosen: Sequence[Setting]) -> list[Job]:
    jobs = []
    for setting in chosen:
        for cell in setting.cells:
            label = _named(setting, f"{cell.method.label}, seed {cell.seed}")
            cost = _cell_cost(setting.size, cell)
            jobs.append(Job(label, setting.folder.result(cell), _run_cell, (setting.folder, cell), cost))
    return list({job.target: job for job in jobs}.values())


def _named(setting: Setting, what: str) -> str:
    return what if setting.name == AS_IT_STANDS else f"{setting.name}, {what}"


def _teacher_cost(size: Size) -> float:
    students = size.teacher_schooling.problems_a_task / size.student_schooling.problems_a_task
    return 4 * students * size.teacher_schooling.steps * _STEP_COST


def _cell_cost(size: Size, cell: Cell) -> float:
    return 0.2 + cell.method.student_share + (size.longer if cell.method.longer else 1)


# ---- what workers do: in processes that load torch only here


def _get_ready() -> None:
    prepare_process()
    from gkd.train.distributed import initialize

    initialize(Launch())


def _make_teacher(folder: Folder) -> str:
    _get_ready()
    from gkd.bench.prepare import make_teacher

    return make_teacher(folder)


def _make_student(folder: Folder, seed: int) -> str:
    _get_ready()
    from gkd.bench.prepare import make_student

    return make_student(folder, seed)


def _write_teacher_texts(folder: Folder) -> str:
    _get_ready()
    from gkd.bench.prepare import write_teacher_texts

    return write_teacher_texts(folder)


def _write_train_files(folder: Folder, seed: int) -> str:
    _get_ready()
    from gkd.bench.prepare import write_train_files

    return write_train_files(folder, seed)


def _run_cell(folder: Folder, cell: Cell) -> str:
    _get_ready()
    from gkd.bench.cell import run_cell

    done = kept_result(folder.result(cell), lambda: run_cell(folder, cell))
    return done["failed"] if "failed" in done else f"{accuracy(done):.1%} greedy, {done['seconds']['all']:.0f} s"


def accuracy(done: dict[str, Any], figure: str = "greedy") -> float:
    """The mean over the tasks."""
    by_task = done["scores"][figure]
    return sum(by_task.values()) / len(by_task)


# ---- results


def results(chosen: Sequence[Setting]) -> list[dict[str, Any]]:
    """All cells that there are, in the order of the plan."""
    found = []
    for setting in chosen:
        for cell in setting.cells:
            path = setting.folder.result(cell)
            if path.exists():
                found.append({"setting": setting.name, **asdict(cell), **read_json(path)})
    return found
