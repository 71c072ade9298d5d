"""One cell: a student distilled by one method through gkd's own parts and loop, up to a number of trained tokens.

It is scored by tasks, at several points, by the sampler that the run has anyway.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

from gkd.bench.budget import BudgetRun, TokenBudget, processor_clock
from gkd.bench.folder import Folder
from gkd.bench.methods import SLOW, START, Cell, Method
from gkd.bench.score import HeldOut, Judge
from gkd.bench.sizes import Size
from gkd.config import Config, make_config
from gkd.data import render_message
from gkd.train import parts
from gkd.train.parts import Models

JUDGE_SEED = 0  # of the draws that a student is scored on: the same for all


def run_cell(folder: Folder, cell: Cell) -> dict[str, Any]:
    """The cell's scores, its curve, and what it took. Raises a GkdError where the run has to stop.

    Of the seconds, `all` is from start to end, and the others are the phases of training.
    """
    started_s = processor_clock()
    budget = TokenBudget(0 if cell.method == START else tokens(folder.size, cell.method), folder.size.looks)
    run = CellRun(folder, cell, budget)
    curve = run.greedy_curve()
    scores = run.judge.everything(run.sampler, run.student)
    return {
        "trained_tokens": budget.trained,
        "sampled_tokens": budget.sampled,
        "steps": budget.step_count,
        "seconds": {**budget.seconds, "all": processor_clock() - started_s},
        "curve": curve,
        "scores": scores,
    }


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


class CellRun(BudgetRun):
    """A run with a judge; it measures with the judge alone."""

    def __init__(self, folder: Folder, cell: Cell, budget: TokenBudget) -> None:
        super().__init__(cell_config(folder, cell), budget)
        self.judge = Judge(
            heldout=read_heldout(folder, self.models),
            settings=replace(parts.sampling_settings(self.config, self.models), temperature=1.0),
            teacher=self.teacher,
            pack=self.pack,
        )

    def greedy_curve(self) -> list[dict[str, Any]]:
        """Trains; the greedy accuracy by task at the start and at the budget's points."""
        return self.curve(lambda: {"greedy": self.judge.greedy(self.sampler)})


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
