"""One run: the student distilled by one method through gkd's own parts and loop, looked at at several points."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from gkd.bench.budget import BudgetRun, Look, TokenBudget
from gkd.bench.machine import device, device_kind
from gkd.bench.text.folder import Folder
from gkd.bench.text.judge import Judge
from gkd.bench.text.methods import START, Cell, Method
from gkd.bench.text.prepare import heldout_prompts, read_teacher_texts
from gkd.config import Config, make_config

_BEYOND = 1 << 40  # tokens that no run comes to


def run_cell(folder: Folder, cell: Cell) -> dict[str, Any]:
    """Its looks, what it took, and of the initial student also the figures of the teacher's own texts. Raises a
    GkdError where the run has to stop."""
    started_s, size = time.perf_counter(), folder.size
    budget = TokenBudget(
        size.tokens(cell.method), size.looks_of(cell.method), size.most_steps(cell.method), time.perf_counter
    )
    run = BudgetRun(cell_config(folder, cell.method, cell.seed, size.most_steps(cell.method)), budget)
    with closing(run.sampler):
        judge = make_judge(folder, run)
        looks = run.curve(lambda: _said(cell, judge.look(run.sampler, run.student), budget))
    teacher = {"teacher": judge.teacher_figures()} if cell.method == START else {}
    return {
        "looks": looks,
        "trained_tokens": budget.trained,
        "sampled_tokens": budget.sampled,
        "steps": budget.step_count,
        "dtype": run.config.student.dtype,
        "device": device(device_kind()),
        "seconds": {**budget.seconds, "all": time.perf_counter() - started_s},
        **teacher,
    }


def _said(cell: Cell, look: Look, budget: TokenBudget) -> Look:
    """A run takes minutes."""
    where = f"{budget.trained} of {budget.tokens} tokens, step {budget.step_count}"
    print(
        f"    {cell.method.label}, seed {cell.seed}: {where}, {look['on_teacher']['forward_kl']:.3f} nats", flush=True
    )
    return look


def time_steps(folder: Folder, method: Method, round_index: int) -> list[dict[str, float]]:
    """The seconds of each of a few steps of the method, by phase, and `all` of them; the first is warm-up."""
    steps = folder.size.timed_steps
    budget = TokenBudget(_BEYOND, 0, steps, time.perf_counter)
    run = BudgetRun(cell_config(folder, method, round_index, steps), budget)
    with closing(run.sampler):
        run.curve(dict)  # without a look
    return budget.seconds_by_step


def cell_config(folder: Folder, method: Method, seed: int, steps: int) -> Config:
    """The run as gkd is told it. The rate is constant after the warm-up, so that every point of a run is what a run of
    that length would have come to."""
    size, material = folder.size, folder.material
    return make_config(
        {
            "run": {"name": "run", "dir": str(folder.scratch), "seed": seed, "steps": steps},
            "teacher": {"model": material.teacher},
            "student": {"model": str(folder.student)},
            "data": {"train": str(material.train), "max_prompt_tokens": size.max_prompt_tokens},
            "rollout": {"engine": size.engine, "temperature": 1.0, "max_new_tokens": size.max_new_tokens},
            "mixture": method.mixture,
            "objective": {"terms": list(method.terms)},
            "optim": {
                "lr": size.lr,
                "warmup_steps": size.warmup_steps,
                "schedule": "constant",
                "batch_size": size.batch_size,
                "micro_batch_size": size.micro_batch_size,
            },
        },
        origin=method.label,
    )


def make_judge(folder: Folder, run: BudgetRun) -> Judge:
    sampled, greedy = read_teacher_texts(folder)
    return Judge(
        prompts=heldout_prompts(folder, run.config, run.models),
        teacher_sampled=sampled,
        teacher_greedy=greedy,
        bucket_tokens=max(1, folder.size.max_new_tokens // folder.size.positions),
        config=run.config,
        models=run.models,
        teacher=run.teacher,
        pack=run.pack,
    )
