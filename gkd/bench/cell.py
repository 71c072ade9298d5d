"""One cell: a student distilled by one method through gkd's own parts and loop, up to a number of trained tokens.

It is gkd's `Run` with another monitor: a run of gkd ends after a number of steps, a cell after a number
of tokens, as the lengths of the student's own completions differ between methods; and it is scored by tasks, at several
points, by the sampler that the run has anyway.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gkd.bench.folder import Folder
from gkd.bench.methods import SLOW, START, Cell, Method
from gkd.bench.score import HeldOut, Judge
from gkd.bench.sizes import Size
from gkd.config import Config, Launch, make_config
from gkd.data import render_message
from gkd.run_files import RunFiles
from gkd.train import distributed, parts
from gkd.train.parts import Models
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.types import Rollout, TokenBatch

JUDGE_SEED = 0  # of the draws that a student is scored on: the same for all
_LAUNCH = Launch()
_DEVICE = distributed.compute_device(_LAUNCH)


def run_cell(folder: Folder, cell: Cell) -> dict[str, Any]:
    """The cell's scores, its curve, and what it took. Raises a GkdError where the run has to stop.

    Of the seconds, `all` is from start to end, and the others are the phases of training.
    """
    started_s = clock()
    budget = TokenBudget(0 if cell.method == START else tokens(folder.size, cell.method), folder.size.looks)
    run = CellRun(folder, cell, budget)
    curve = run.curve()
    scores = run.judge.everything(run.sampler, run.student)
    return {
        "trained_tokens": budget.trained,
        "sampled_tokens": budget.sampled,
        "steps": budget.step_count,
        "seconds": {**budget.seconds, "all": clock() - started_s},
        "curve": curve,
        "scores": scores,
    }


def clock() -> float:
    """Seconds. On a CPU those of the processor, as a cell has one thread: other programs beside it do not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def tokens(size: Size, method: Method) -> int:
    """How many completion tokens a method is trained on."""
    return size.trained_tokens * (size.longer if method.longer else 1)


def cell_config(folder: Folder, cell: Cell) -> Config:
    """The run as gkd is told it. `run.steps` is where the learning rate has come down to 0: as many steps as the tokens
    make of completions that are as long as the data's."""
    size, method = folder.size, cell.method
    completion_tokens = statistics.fmean(len(problem.answer) + 1 for problem in folder.train_problems(cell.seed))
    steps = math.ceil(tokens(size, method) / (size.batch_size * completion_tokens))
    return make_config(
        {
            "run": {"name": "cell", "seed": cell.seed, "steps": steps},
            "teacher": {"model": str(folder.teacher), "dtype": "float32", "micro_batch_size": size.batch_size},
            "student": {"model": str(folder.student(cell.seed)), "dtype": "float32"},
            "data": {
                "train": str(folder.train_file(cell.seed, method.completions)),
                "max_prompt_tokens": size.max_prompt_tokens,
            },
            "rollout": {
                "engine": "transformers",
                "temperature": method.sampling_temperature,
                "max_new_tokens": size.max_new_tokens,
                "max_num_seqs": 512,
            },
            "mixture": {"student": method.student_share, "dataset": 1.0 - method.student_share},
            "objective": {"temperature": method.loss_temperature, **_term(method)},
            "optim": {
                "lr": size.lr * (SLOW if method.signal == "fixed_negative_slow" else 1.0),
                "warmup_steps": min(5, steps // 4),
                "schedule": "linear",
                "batch_size": size.batch_size,
                "micro_batch_size": size.batch_size,
            },
        },
        origin=cell.method.label,
    )


def _term(method: Method) -> dict[str, Any]:
    """What the method's signal is, as the objective's one term."""
    if method.signal == "labels":
        return {"kind": "cross_entropy"}
    if method.signal == "teacher":
        return {"kind": method.objective.kind, "beta": method.objective.beta, "alpha": method.objective.alpha}
    return {"kind": "policy_gradient", "advantage": "constant", "constant": -1.0}


@dataclass
class TokenBudget:
    """Implements the loop's `Monitor`: steps until so many completion tokens were trained on, and what they took."""

    tokens: int
    looks: int
    trained: int = 0
    sampled: int = 0  # by the student, for training
    step_count: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def steps(self) -> Iterator[int]:
        while self.trained < self.tokens:
            yield self.step_count
            self.step_count += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_s = clock()
        yield
        self.seconds[name] += clock() - started_s

    def note(self, text: str) -> None:
        del text

    def first_batch(self, rollouts: Sequence[Rollout], micro_batches: Sequence[TokenBatch]) -> None:
        del rollouts, micro_batches

    def log(self, step: int, *groups: dict[str, float]) -> None:
        del step
        metrics = {name: value for group in groups for name, value in group.items()}
        self.trained += int(metrics["tokens/scored"])
        self.sampled += int(metrics["tokens/sampled"])

    def looks_due(self) -> int:
        """How many of the evenly spaced points are behind."""
        return min(self.looks, self.trained * self.looks // max(self.tokens, 1))


class CellRun(Run):
    """A run with the budget for its monitor and a judge; it measures with the judge alone, and writes nothing."""

    def __init__(self, folder: Folder, cell: Cell, budget: TokenBudget) -> None:
        self._budget = budget
        config = cell_config(folder, cell)
        distributed.initialize(_LAUNCH)
        super().__init__(config, _LAUNCH, RunFiles(config.run.folder), ask_placements(config))
        self.build()
        self._curve: list[dict[str, Any]] = []
        self.judge = Judge(
            heldout=read_heldout(folder, self.models),
            settings=replace(parts.sampling_settings(config, self.models), temperature=1.0),
            teacher=self.teacher,
            pack=self.pack,
        )

    def curve(self) -> list[dict[str, Any]]:
        """Trains; the greedy accuracy by task at the start and at the budget's points."""
        self._look()
        self.loop()
        return self._curve

    def _look(self) -> None:
        self._curve.append({"tokens": self._budget.trained, "greedy": self.judge.greedy(self.sampler)})

    def build_monitor(self) -> TokenBudget:
        return self._budget

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        return {"tokens/sampled": float(sum(len(r.completion_ids) for r in rollouts if r.source == "student"))}

    def evaluate(self, steps_done: int) -> dict[str, float]:
        del steps_done
        return {}

    def save(self, steps_done: int) -> None:
        del steps_done
        if self._budget.looks_due() >= len(self._curve):
            self._look()


def read_heldout(folder: Folder, models: Models) -> HeldOut:
    """The held-out problems with the teacher's texts, tokenised as the train data are."""
    written = json.loads(folder.teacher_texts.read_text())
    problems = tuple(folder.heldout_problems())
    prompts = [render_message(problem.prompt, models.tokenizer) for problem in problems]
    return HeldOut(
        problems=problems,
        prompts=tuple(replace(prompt, index=index) for index, prompt in enumerate(prompts)),
        teacher_completions=tuple(tuple(ids) for ids in written["completions"]),
        samples=folder.size.samples,
        seed=JUDGE_SEED,
    )
