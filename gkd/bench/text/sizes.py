"""What decides the comparison's numbers: models, prompts, methods, and how much of everything."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gkd.bench.options import named
from gkd.bench.text.methods import ALL, FEW, START, Cell, Method

RESULTS_VERSION = 1  # to be raised when a change of the code alters results: kept parts are then made anew
_MARGIN = 1.15  # steps that a run may take, in those that it takes if all texts are as long as allowed; see most_steps
_DECIDES_NO_CELL = ("name", "methods", "seeds", "rounds", "timed_steps")


@dataclass(frozen=True)
class Size:
    """The student is the teacher without some of its layers, those that are missed least by measured divergence."""

    name: str
    methods: tuple[Method, ...]
    seeds: int
    rounds: int  # of the timing: each method once
    timed_steps: int  # of a method in a round; the first is not counted
    trained_tokens: int  # of a method that is not `longer`: completion tokens that the loss is taken on
    looks: int  # measurements within so many tokens, evenly spaced
    heldout_prompts: int
    layers: int = 20
    engine: str = "vllm"
    batch_size: int = 16
    micro_batch_size: int = 8
    lr: float = 3e-4
    warmup_steps: int = 4
    max_new_tokens: int = 48
    max_prompt_tokens: int = 192
    positions: int = 8  # groups of places in a completion that divergences are given for

    def cells(self) -> list[Cell]:
        """Seed by seed: a run that is cut off has all methods of the first ones."""
        return [Cell(START, 0), *(Cell(method, seed) for seed in range(self.seeds) for method in self.methods)]

    def tokens(self, method: Method) -> int:
        return round(self.trained_tokens * method.longer)

    def looks_of(self, method: Method) -> int:
        return round(self.looks * method.longer)

    def most_steps(self, method: Method) -> int:
        """Beyond them there are no teacher's texts. A student's samples may be short; the teacher's seldom are."""
        steps = self.tokens(method) / (self.batch_size * self.max_new_tokens)
        return max(1, math.ceil((_MARGIN + method.student_share) * steps))

    def deciding(self) -> dict[str, Any]:
        """What a cell's result hangs on besides its method and seed."""
        return {name: value for name, value in asdict(self).items() if name not in _DECIDES_NO_CELL}


@dataclass(frozen=True)
class Material:
    """A teacher, as `teacher.model` names it, and files of prompts."""

    teacher: str
    train: Path
    heldout: Path


SIZES = {
    "small": Size(
        name="small",
        methods=FEW,
        seeds=1,
        rounds=1,
        timed_steps=2,
        trained_tokens=1200,
        looks=2,
        heldout_prompts=8,
        warmup_steps=0,
        max_new_tokens=24,
    ),
    "full": Size(
        name="full", methods=ALL, seeds=3, rounds=3, timed_steps=5, trained_tokens=16_000, looks=8, heldout_prompts=48
    ),
}


def size_named(name: str) -> Size:
    """Raises InputError."""
    return named(SIZES, name, "--size")
