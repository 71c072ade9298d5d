"""The held-out divergence of a finished student, in one process and without an optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from gkd.config import Config, Launch, ObjectiveConfig
from gkd.errors import ConfigError
from gkd.models import load_causal_lm
from gkd.train import build
from gkd.train.distributed import compute_device
from gkd.train.module import StudentModule, mean_divergences
from gkd.train.run_folder import RunFolder
from gkd.types import OutputHead, TokenBatch

_log = logging.getLogger(__name__)


class FrozenStudent:
    """Implements `MeasuresDivergence` with a plain module."""

    def __init__(self, module: StudentModule, device: torch.device) -> None:
        self._module = module.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def divergences(
        self, micro_batches: Sequence[TokenBatch], teacher_head: OutputHead, objective: ObjectiveConfig
    ) -> dict[str, float]:
        return mean_divergences(self._module, micro_batches, teacher_head, objective, self._device)


def evaluate_student(config: Config, student: str) -> dict[str, float]:
    """`heldout/*` of `student` on the same teacher texts that a run of `config` measures. Nats a token.

    Raises ConfigError without held-out data, and what loading models and data raises.
    """
    if config.data.heldout is None:
        raise ConfigError("data.heldout: gkd eval needs held-out data")
    launch = Launch()
    as_student = config.model_copy(
        update={"student": config.student.model_copy(update={"model": student, "init": None, "revision": None})}
    )
    models = build.locate_models(as_student, RunFolder(config.run.folder), launch)
    prompts = build.load_data(as_student, models)
    data = build.prompt_data(as_student, prompts, launch)
    texts = build.teacher_texts(as_student, models, prompts, data, launch, _log.info)
    device = compute_device(launch)
    dtype = getattr(torch, config.student.dtype)
    module = StudentModule(
        load_causal_lm(models.student_path, dtype, key="--student"), config.objective, models.valid_vocab, dtype
    )
    heldout = build.build_heldout(
        as_student,
        models,
        prompts,
        texts,
        teacher=build.build_teacher(as_student, models, launch),
        student=FrozenStudent(module, device),
        launch=launch,
    )
    assert heldout is not None
    return heldout.measure()
