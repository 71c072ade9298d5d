"""One cell: a student distilled by one method through gkd's own parts and loop, up to a number of trained tokens.

It is scored by tasks, at several points, by the sampler that the run has anyway.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gkd.bench.budget import BudgetRun, TokenBudget, processor_clock
from gkd.bench.folder import FOLLOWED_PROBLEMS, Folder
from gkd.bench.methods import START, SUPERVISED_KD, Cell, Method
from gkd.bench.models import make_model, save_model
from gkd.bench.score import HeldOut, Judge
from gkd.bench.sizes import Size
from gkd.bench.tasks import TASKS
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
    done = _through_assistant(folder, cell) if cell.method.through_assistant else CellRun(folder, cell).result()
    done["seconds"]["all"] = processor_clock() - started_s
    return done


def _through_assistant(folder: Folder, cell: Cell) -> dict[str, Any]:
    """Two trainings: tokens, steps and seconds are those of both, and `assistant` is what the first came to.

    The assistant teaches; the student is compared with the teacher all the same.
    """
    first = CellRun(folder.assistant, Cell(SUPERVISED_KD, cell.seed))
    assistant = first.result()
    with TemporaryDirectory() as trained:
        model = make_model(folder.size.assistant, cell.seed)
        model.load_state_dict(dict(first.student.weights()), strict=False)  # the head is the embeddings
        save_model(model, Path(trained))
        second = CellRun(folder, cell, teacher=Path(trained))
    second.judge = replace(second.judge, teacher=first.teacher)
    done = second.result()
    for name in ("trained_tokens", "sampled_tokens", "steps"):
        done[name] += assistant[name]
    done["seconds"] = {name: one + assistant["seconds"][name] for name, one in done["seconds"].items()}
    return {**done, "assistant": assistant}


def tokens(size: Size, method: Method) -> int:
    """How many completion tokens a method is trained on."""
    if method == START:
        return 0
    return size.trained_tokens * (size.longer if method.longer else 1) // (2 if method.through_assistant else 1)


def cell_config(folder: Folder, cell: Cell, teacher: Path) -> Config:
    """The run as gkd is told it. `run.steps` is where the learning rate has come down to 0: as many steps as the tokens
    make of completions that are as long as the data's."""
    size, method = folder.size, cell.method
    followed = {"heldout": str(folder.followed_file)} if method.evaluations else {}
    completion_tokens = statistics.fmean(len(problem.answer) + 1 for problem in folder.train_problems(cell.seed))
    steps = max(1, math.ceil(tokens(size, method) / (size.batch_size * completion_tokens)))
    return make_config(
        {
            "run": {"name": "cell", "seed": cell.seed, "steps": steps},
            "teacher": {"model": str(teacher), "dtype": "float32", "micro_batch_size": size.batch_size},
            "student": {"model": str(folder.student(cell.seed)), "dtype": "float32"},
            "data": {
                "train": str(folder.train_file(cell.seed, method.completions)),
                "max_prompt_tokens": size.max_prompt_tokens,
                **followed,
            },
            "rollout": {
                "engine": "transformers",
                "max_new_tokens": size.max_new_tokens,
                "max_num_seqs": 512,
                **method.rollout,
            },
            "mixture": method.mixture,
            "objective": method.objective,
            "eval": {
                "every": max(1, steps // method.evaluations) if method.evaluations else 0,
                "prompts": FOLLOWED_PROBLEMS * len(TASKS),
                "samples": 0,
            },
            "optim": {
                "lr": size.lr * method.lr_factor,
                "warmup_steps": min(5, steps // 4),
                "schedule": "linear",
                "batch_size": size.batch_size,
                "micro_batch_size": size.batch_size,
            },
        },
        origin=cell.method.label,
    )


class CellRun(BudgetRun):
    """A run with a judge, who has the run's own teacher."""

    def __init__(
        self, folder: Folder, cell: Cell, budget: TokenBudget | None = None, teacher: Path | None = None
    ) -> None:
        budget = budget or TokenBudget(tokens(folder.size, cell.method), folder.size.looks)
        super().__init__(cell_config(folder, cell, teacher or folder.teacher), budget)
        self.judge = Judge(
            heldout=read_heldout(folder, self.models),
            settings=replace(parts.sampling_settings(self.config, self.models), temperature=1.0),
            teacher=self.teacher,
            pack=self.pack,
        )

    def greedy_curve(self) -> list[dict[str, Any]]:
        """Trains; the greedy accuracy by task at the start and at the budget's points."""
        return self.curve(lambda: {"greedy": self.judge.greedy(self.sampler)})

    def result(self) -> dict[str, Any]:
        """Trains, and is scored."""
        curve = self.greedy_curve()
        return {
            "trained_tokens": self.budget.trained,
            "sampled_tokens": self.budget.sampled,
            "steps": self.budget.step_count,
            "seconds": self.budget.seconds,
            "curve": curve,
            "scores": self.judge.everything(self.sampler, self.student),
        }


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
