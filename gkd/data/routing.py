"""Which of several teachers teaches a prompt: as its row says, or by a draw."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

from gkd.config import MAIN_TEACHER
from gkd.errors import DataError
from gkd.seeding import derive_uniform
from gkd.types import Prompt


class NamesTeacher(Protocol):
    """A row or a prompt."""

    @property
    def origin(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...


def check_teacher_names(rows: Iterable[NamesTeacher], names: Collection[str], column: str | None) -> None:
    """Raises DataError, with file:line, for a row that names a teacher that there is not."""
    for row in rows:
        if row.teacher is not None and row.teacher not in names:
            raise DataError(f"{row.origin}: {column}: there is no teacher {row.teacher!r}; known: {', '.join(names)}")


def draw_teachers(prompts: Sequence[Prompt], weights: Mapping[str, float], seed: int, split: str) -> tuple[Prompt, ...]:
    """Gives each prompt to one of `weights` with that probability, else to the main teacher.

    The draw depends on (seed, split, prompt) alone: it is the same in all epochs, on all ranks and after a resume.
    """
    bounds = dict(zip(weights, accumulate(weights.values()), strict=True))

    def drawn(prompt: Prompt) -> str:
        u = derive_uniform(seed, "teacher of", split, prompt.index)
        return next((name for name, bound in bounds.items() if u < bound), MAIN_TEACHER)

    return tuple(replace(prompt, teacher=drawn(prompt)) for prompt in prompts)
