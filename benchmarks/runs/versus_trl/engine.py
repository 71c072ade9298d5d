"""gkd's side: the run's config, and a run of it whose steps are timed by gkd's own monitor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.runs.versus_trl.job import Job, Work
from gkd.config import Config, make_config


def gkd_config(work: Work, folder: Path, seed: int, *, heldout: bool = False) -> Config:
    """The run that all contenders are held to. Without held-out data nothing but the steps is done."""
    return make_config(
        {
            "run": {"name": folder.name, "dir": str(folder), "steps": work.steps, "seed": seed},
            "teacher": {"model": work.teacher, "dtype": "bfloat16"},
            "student": {"model": str(work.student), "dtype": "bfloat16"},
            "data": {
                "train": str(work.ordered_prompts),
                "heldout": work.heldout if heldout else None,
                "max_prompt_tokens": work.max_prompt_tokens,
                "shuffle": False,
            },
            "rollout": {
                "engine": work.engine,
                "temperature": 1.0,
                "max_new_tokens": work.max_new_tokens,
                "kv_cache_gib": 0.25,  # 16 sequences of 240 tokens need 0.1
            },
            "mixture": {"student": 1.0},
            "objective": {"kind": work.kind, "beta": work.beta},
            "optim": {
                "lr": work.lr,
                "betas": work.betas,
                "eps": work.eps,
                "weight_decay": work.weight_decay,
                "schedule": "constant",
                "max_grad_norm": work.max_grad_norm,
                "batch_size": work.batch_size,
                "micro_batch_size": work.micro_batch_size,
                "micro_batch_tokens": work.micro_batch_tokens,
            },
            "eval": {"prompts": work.heldout_prompts, "samples": 0},
            "log": {"show_first_batch": False},
        },
        origin="the benchmark's config",
    )


def distil(config: Config) -> None:
    from gkd import Distiller

    Distiller(config).train()


def run(job: Job, train: Callable[[Config], None] = distil) -> dict[str, Any]:
    """Trains; returns the steps' times, and the folder of the trained student."""
    from gkd.monitor import read_metrics

    folder = Path(job.options["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    train(gkd_config(job.work, folder, job.options["seed"]))
    steps = [
        {
            "step_s": record["time/step_s"],
            "sampling_s": record["time/sample_s"],
            "scoring_s": record["time/score_s"],
            "training_s": record["time/train_s"],
            "sync_s": record["time/sync_s"],
            "other_s": record["time/other_s"],
            "tokens": record["tokens/generated"],
        }
        for record in read_metrics(folder / "metrics.jsonl")
    ]
    return {"steps": steps, "student": str(folder / "final")}
