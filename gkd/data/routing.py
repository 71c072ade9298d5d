"""Which of several teachers teaches a row: as it says, or by a draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import accumulate
from typing import Protocol

from gkd.config import MAIN_TEACHER, Config
from gkd.errors import DataError
from gkd.seeding import derive_uniform


class NamesTeacher(Protocol):
    """A row."""

    @property
    def origin(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...


def check_teacher_names(rows: Iterable[NamesTeacher], names: Collection[str], column: str | None) -> None:
    """Raises DataError, with file:line, for a row that names a teacher that there is not."""
    for row in rows:
        if row.teacher is not None and row.teacher not in names:
            raise DataError(f"{row.origin}: {column}: there is no teacher {row.teacher!r}; known: {', '.join(names)}")


def row_teachers(config: Config, split: str) -> Callable[[int, NamesTeacher], str]:
    """By a row's number, and the row, its teacher's name. Raises DataError for a name that there is not."""
    column = config.data.teacher_column
    if column is None:
        drawn = teacher_draw({n: t.weight for n, t in config.other_teachers.items()}, config.run.seed, split)
        return lambda index, _: drawn(index)

    def named(_: int, row: NamesTeacher) -> str:
        check_teacher_names([row], config.teachers, column)
        return row.teacher or MAIN_TEACHER

    return named


def teacher_draw(weights: Mapping[str, float], seed: int, split: str) -> Callable[[int], str]:
    """Gives each row, by its number, to one of `weights` with that probability, else to the main teacher.

    The draw depends on (seed, split, number) alone: it is the same in all epochs, on all ranks and after a resume.
    """
    if not weights:
        return lambda index: MAIN_TEACHER
    bounds = dict(zip(weights, accumulate(weights.values()), strict=True))

    def drawn(index: int) -> str:
        u = derive_uniform(seed, "teacher of", split, index)
        return next((name for name, bound in bounds.items() if u < bound), MAIN_TEACHER)

    return drawn
