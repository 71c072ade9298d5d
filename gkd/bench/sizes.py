"""What decides the table's numbers besides the methods: models, data, and how much of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gkd.bench.kept import short_name
from gkd.bench.options import named

RESULTS_VERSION = 4  # to be raised when a change of the code alters results: kept parts are then made anew


@dataclass(frozen=True)
class Shape:
    """A Llama whose heads are 16 wide, and its feed-forward layers three times as wide as the hidden states."""

    hidden: int
    layers: int


@dataclass(frozen=True)
class Schooling:
    """A supervised phase on right answers: AdamW, linear warm-up and decay."""

    steps: int
    problems_a_task: int  # in each step
    lr: float


@dataclass(frozen=True)
class Size:
    """Counts of problems are for each task."""

    name: str
    teacher: Shape
    student: Shape
    assistant: Shape  # between the two
    teacher_schooling: Schooling  # on new problems in every step
    student_schooling: Schooling  # on its train problems again and again
    train_problems: int
    heldout_problems: int
    samples: int  # of each held-out problem, for sampled accuracy and pass@k
    trained_tokens: int  # of a cell: completion tokens that the loss is taken on
    longer: int  # how many times as many the control that trains longer on data gets
    batch_size: int  # completions a step
    lr: float
    looks: int  # measurements of the greedy accuracy within a cell, evenly spaced in tokens
    seeds: int
    main_seeds: int  # of the methods that the paper's ratio is made of, and of the baselines
    swept_train_problems: tuple[int, ...]
    swept_schooling_steps: tuple[int, ...]
    max_new_tokens: int = 14
    max_prompt_tokens: int = 12

    @property
    def about_steps(self) -> int:
        """Of a cell: an answer of the data has about 8 tokens."""
        return max(1, self.trained_tokens // (8 * self.batch_size))


SIZES = {
    "smoke": Size(
        name="smoke",
        teacher=Shape(32, 2),
        student=Shape(16, 1),
        assistant=Shape(32, 1),
        teacher_schooling=Schooling(20, 8, 5e-3),
        student_schooling=Schooling(5, 8, 5e-3),
        train_problems=16,
        heldout_problems=4,
        samples=2,
        trained_tokens=500,
        longer=2,
        batch_size=16,
        lr=1e-3,
        looks=2,
        seeds=1,
        main_seeds=2,
        swept_train_problems=(8,),
        swept_schooling_steps=(),
    ),
    "cpu": Size(
        name="cpu",
        teacher=Shape(96, 3),
        student=Shape(48, 2),
        assistant=Shape(64, 3),
        teacher_schooling=Schooling(2000, 32, 3e-3),
        student_schooling=Schooling(800, 16, 5e-3),
        train_problems=4000,
        heldout_problems=100,
        samples=8,
        trained_tokens=200_000,
        longer=3,
        batch_size=64,
        lr=2e-3,
        looks=4,
        seeds=3,
        main_seeds=5,
        swept_train_problems=(500,),
        swept_schooling_steps=(400, 1600),
    ),
    "gpu": Size(
        name="gpu",
        teacher=Shape(512, 8),
        student=Shape(192, 4),
        assistant=Shape(320, 6),
        teacher_schooling=Schooling(20_000, 256, 5e-4),
        student_schooling=Schooling(1500, 64, 1e-3),
        train_problems=5000,
        heldout_problems=500,
        samples=16,
        trained_tokens=3_000_000,
        longer=4,
        batch_size=512,
        lr=3e-4,
        looks=10,
        seeds=3,
        main_seeds=5,
        swept_train_problems=(500, 50_000),
        swept_schooling_steps=(500, 5000),
    ),
}


def size_named(name: str) -> Size:
    """Raises InputError."""
    return named(SIZES, name, "--size")


def key(*parts: Any) -> str:
    """A short name for values that decide a result."""
    return short_name(RESULTS_VERSION, *parts)
