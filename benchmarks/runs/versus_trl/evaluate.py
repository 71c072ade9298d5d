"""gkd's held-out measure of any contender's student: divergences on texts of the teacher that nobody trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.runs.versus_trl.engine import gkd_config
from benchmarks.runs.versus_trl.job import Job
from gkd.config import Config, Launch
from gkd.models import load_causal_lm
from gkd.objectives.objective import Objective
from gkd.planning.settled import settle_here
from gkd.run_files import RunFiles
from gkd.train import parts
from gkd.train.distributed import compute_device
from gkd.train.module import StudentModule, token_measures
from gkd.train.placements import ask_placements
from gkd.types import TokenBatch

LAUNCH = Launch()


class FrozenStudent:
    """What a run measures with its engine, with a plain module."""

    def __init__(self, module: StudentModule) -> None:
        self._device = compute_device(LAUNCH)
        self._module = module.to(self._device).eval().requires_grad_(False)

    @torch.no_grad()
    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        return token_measures(self._module, micro_batches, objective, self._device)


def run(job: Job) -> dict[str, Any]:
    """Nats a token by student folder; the teacher's texts are sampled once, then cached."""
    config = gkd_config(job.work, job.work.prepared / "run", seed=0, heldout=True)
    config = settle_here(config, LAUNCH.local_rank, LAUNCH.world_size).config
    return {student: heldout_divergences(config, student) for student in job.options["students"]}


def heldout_divergences(config: Config, student: str) -> dict[str, float]:
    section = config.student.model_copy(update={"model": student})
    config = config.model_copy(update={"student": section})
    placements = ask_placements(config)
    models = parts.locate_models(config, RunFiles(config.run.folder), LAUNCH, placements)
    prompts = parts.load_data(config, models)
    data = parts.prompt_data(config, prompts, LAUNCH)
    texts = parts.teacher_texts(config, models, prompts, data, LAUNCH, logging.getLogger(__name__).info)
    dtype = getattr(torch, config.student.dtype)
    model = load_causal_lm(models.student_path, dtype, key="student.model")
    heldout = parts.build_heldout(
        config,
        models,
        prompts,
        texts,
        teacher=parts.build_teacher(config, models, LAUNCH, placements),
        student=FrozenStudent(StudentModule(model, models.valid_vocab, dtype)),
        launch=LAUNCH,
    )
    assert heldout is not None
    return heldout.measure().means
