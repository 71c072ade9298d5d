"""One cell: a student distilled by one method through gkd's own parts and loop, up to a number of trained tokens.

It is the run of `gkd.Distiller` with another monitor: a run of gkd ends after a number of steps, a cell after a number
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

from gkd.config import Config, Launch, make_config
from gkd.data import render_message
from gkd.models import load_causal_lm
from gkd.train import distributed, parts
from gkd.train.engine import StudentEngine
from gkd.train.loop import train_loop
from gkd.train.parts import Models
from gkd.train.placements import ask_placements
from gkd.train.run_folder import RunFolder
from gkd.types import Rollout, TokenBatch

from .controls import FixedNegativeAdvantage, NoTeacher
from .folder import Folder
from .methods import SLOW, START, Cell, Method
from .score import HeldOut, Judge
from .sizes import Size

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
    curve = run.train()
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
            "objective": {
                "kind": method.objective.kind,
                "beta": method.objective.beta,
                "alpha": method.objective.alpha,
                "temperature": method.loss_temperature,
                "hard_label_weight": 1.0 if method.signal == "labels" else 0.0,
            },
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


class CellRun:
    """The parts of a cell, as `gkd.train.parts` makes them, and the judge."""

    def __init__(self, folder: Folder, cell: Cell, budget: TokenBudget) -> None:
        distributed.initialize(_LAUNCH)
        self._config = config = cell_config(folder, cell)
        placements = ask_placements(config)
        self._models = models = parts.locate_models(config, RunFolder(config.run.folder), _LAUNCH, placements)
        self._budget = budget
        prompts = parts.load_data(config, models)
        self._data = parts.prompt_data(config, prompts, _LAUNCH)
        self._texts = parts.teacher_texts(config, models, prompts, self._data, _LAUNCH, lambda note: None)
        self.sampler = parts.build_sampler(config, models, prompts, _LAUNCH, placements.sampler)
        self.student = _build_student(config, models, cell.method, budget)
        scorer = parts.build_teacher(config, models, _LAUNCH, placements)
        self.teacher = scorer if cell.method.signal == "teacher" else NoTeacher(models.valid_vocab, _DEVICE)
        self.pack = parts.packer(config, models, "token_mean")
        self.judge = Judge(
            heldout=read_heldout(folder, models),
            settings=replace(parts.sampling_settings(config, models), temperature=1.0),
            teacher=scorer,
            pack=self.pack,
        )
        self.sampler.load_weights(self.student.weights(), version=0)

    def train(self) -> list[dict[str, Any]]:
        """The greedy accuracy by task at the start and at the budget's points."""
        budget = self._budget
        curve = [{"tokens": 0, "greedy": self.judge.greedy(self.sampler)}]

        def look(step: int) -> None:
            del step
            if budget.looks_due() >= len(curve):
                curve.append({"tokens": budget.trained, "greedy": self.judge.greedy(self.sampler)})

        train_loop(
            data=self._data,
            rollout=parts.build_rollouts(self._config, self._models, self.sampler, self._texts, self._data),
            teacher=self.teacher,
            student=self.student,
            pack=self.pack,
            measure=_sampled_tokens,
            evaluate=lambda step: {},
            monitor=budget,
            save=look,
        )
        return curve


def _build_student(config: Config, models: Models, method: Method, budget: TokenBudget) -> StudentEngine:
    if not method.signal.startswith("fixed_negative"):
        return parts.build_student(config, models, _LAUNCH, budget.phase)
    model: Any = load_causal_lm(models.student_path, "float32", key="student.model")
    model.to(_DEVICE).train()
    return FixedNegativeAdvantage(model, config, _LAUNCH, valid_vocab=models.valid_vocab, phase=budget.phase)


def _sampled_tokens(rollouts: Sequence[Rollout]) -> dict[str, float]:
    return {"tokens/sampled": float(sum(len(r.completion_ids) for r in rollouts if r.source == "student"))}


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
