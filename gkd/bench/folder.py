"""Where the parts of a table lie on the disk, each in a folder or file named by a hash of what decides it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gkd.bench.methods import Cell, Completions
from gkd.bench.sizes import Size, key
from gkd.bench.tasks import Problem, problems
from gkd.files import write_atomically

_TEACHER_SEED, _HELDOUT_SEED, _TRAIN_SEED, _FOLLOWED_SEED = 1_000_000, 2_000_000, 3_000_000, 4_000_000
FOLLOWED_PROBLEMS = 16  # a task
_DECIDES_NO_CELL = ("name", "seeds", "main_seeds", "swept_train_problems", "swept_schooling_steps")


@dataclass(frozen=True)
class Folder:
    """A part that exists is complete: all are written aside and renamed."""

    root: Path
    size: Size

    # ---- what decides what

    def _teacher_key(self) -> str:
        return key(self.size.teacher, self.size.teacher_schooling, self.size.heldout_problems)

    def _text_key(self) -> str:
        """Of what the teacher writes."""
        return key(self._teacher_key(), self.size.max_new_tokens)

    def _student_key(self) -> str:
        size = self.size
        return key(size.student, size.student_schooling, size.train_problems, size.heldout_problems)

    # ---- where it lies

    @property
    def teacher(self) -> Path:
        return self.root / f"teacher-{self._teacher_key()}"

    @property
    def teacher_texts(self) -> Path:
        """What the teacher sampled for the held-out problems, and how good it is."""
        return self.root / f"teacher-texts-{self._text_key()}.json"

    def student(self, seed: int) -> Path:
        """What all methods with this seed start from."""
        return self.root / f"student-{self._student_key()}-seed{seed}"

    def train_file(self, seed: int, completions: Completions) -> Path:
        """A JSONL of gkd; the problems of a seed are the same whoever wrote the completions."""
        return self.root / f"train-{self._text_key()}-{self.size.train_problems}-seed{seed}-{completions}.jsonl"

    @property
    def followed_file(self) -> Path:
        """Prompts whose divergence a rule of an objective follows: none that a student is judged by."""
        return self.root / f"followed-{key(self.size.heldout_problems, FOLLOWED_PROBLEMS)}.jsonl"

    @property
    def assistant(self) -> Folder:
        """In which the assistant is the student, of half of the tokens."""
        size = replace(self.size, student=self.size.assistant, trained_tokens=self.size.trained_tokens // 2)
        return Folder(self.root, size)

    def result(self, cell: Cell) -> Path:
        size = {name: value for name, value in asdict(self.size).items() if name not in _DECIDES_NO_CELL}
        return self.root / "cells" / f"{key(size, cell)}.json"

    # ---- problems

    def heldout_problems(self) -> list[Problem]:
        return problems(_HELDOUT_SEED, self.size.heldout_problems)

    def heldout_prompts(self) -> set[str]:
        return {problem.prompt for problem in self.heldout_problems()}

    def train_problems(self, seed: int) -> list[Problem]:
        return problems(_TRAIN_SEED + seed, self.size.train_problems, self.heldout_prompts())

    def followed_problems(self) -> list[Problem]:
        return problems(_FOLLOWED_SEED, FOLLOWED_PROBLEMS, self.heldout_prompts())

    def teacher_problems(self, step: int, exclude: set[str]) -> list[Problem]:
        """New ones in every step."""
        return problems(_TEACHER_SEED + step, self.size.teacher_schooling.problems_a_task, exclude)


def write_rows(path: Path, prompts: Iterable[str], completions: Iterable[str]) -> None:
    rows = ({"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True))
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
