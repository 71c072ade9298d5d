"""The student, and where its training is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gkd.config import Config, Launch
from gkd.config.deepspeed import deepspeed_config
from gkd.config.training import TrainingSettings
from gkd.data.tasks import named_tasks
from gkd.errors import RunFolderError
from gkd.models import (
    inject_lora,
    load_causal_lm,
    quantize_student,
    use_float32_adapters,
    use_packed_attention,
    use_short_attention,
    verify_head,
)
from gkd.run_files import RunFiles
from gkd.seeding import derive_seed
from gkd.train.checkpoint import Checkpointer, HasState, States, find_resume_step
from gkd.train.distributed import compute_device, from_main
from gkd.train.engine import Phase, StudentEngine, Watch
from gkd.train.guards import MismatchGuard
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, student_revision
from gkd.train.reference import InitialStudent


def build_student(
    config: Config, models: Models, prompts: Prompts, launch: Launch, phase: Phase, watch: Watch
) -> StudentEngine:
    """Float32 master weights of what is trained; compute is in student.dtype, and so are frozen weights."""
    lora = config.student.lora
    dtype = "float32" if lora is None else config.student.dtype
    device = compute_device(launch)
    model = _load(config, models, dtype, device)
    verify_head(model, "student.model")
    if lora is not None:
        inject_lora(model, lora, seed=derive_seed(config.run.seed, "lora"))
        use_float32_adapters(model)
    quantize_student(model, config.student.quantize, config.student.dtype)
    model.train()
    return StudentEngine(
        model,
        TrainingSettings.of(config),
        launch,
        valid_vocab=models.valid_vocab,
        state_pairs=models.state_pairs,
        sampler_applies_adapter=config.sampler_lora(device.type) is not None,
        reference=_reference(config, models, device),
        mismatch=MismatchGuard(config.rollout.max_mismatch, _less_mismatch(config)),
        tasks=named_tasks(prompts.train.prompts, config.environment),
        phase=phase,
        watch=watch,
    )


def _load(config: Config, models: Models, dtype: str, device: torch.device) -> Any:
    """The student as it begins, with the attention that its batches need."""
    model: Any = load_causal_lm(models.student_path, dtype, revision=student_revision(config), key="student.model")
    model.to(device)
    if config.optim.micro_batch_tokens is None:
        use_short_attention(model)
    else:
        use_packed_attention(model, "optim.micro_batch_tokens", getattr(torch, config.student.dtype))
    return model


def _reference(config: Config, models: Models, device: torch.device) -> InitialStudent | None:
    """None where nothing asks for it, and with LoRA, as the student below its adapter is the initial one."""
    if not config.objective.needs_reference or config.student.lora is not None:
        return None
    model = _load(config, models, config.student.dtype, device)
    quantize_student(model, config.student.quantize, config.student.dtype)
    return InitialStudent(model)


def _less_mismatch(config: Config) -> str:
    """What lowers the mismatch of a run, or makes up for it."""
    makes_up = "set token_weight: {importance: {}} of the terms"
    if config.rollout.staleness:
        return f"lower rollout.staleness, or {makes_up}"
    return makes_up if config.student.dtype == "float32" else f"set student.dtype: float32, or {makes_up}"


def checkpoint_layout(config: Config, launch: Launch) -> dict[str, int]:
    settings = deepspeed_config(TrainingSettings.of(config), launch.world_size)
    return {"world_size": launch.world_size, "zero_stage": settings["zero_optimization"]["stage"]}


def resume_step(config: Config, folder: RunFiles, launch: Launch, note: Callable[[str], None]) -> int:
    """Where a resume starts, before any model is loaded. Raises what `find_resume_step` raises."""
    layout = checkpoint_layout(config, launch)
    step = from_main(find_resume_step(folder.checkpoints, layout, note) if launch.is_main else None)
    if step > config.run.steps:
        raise RunFolderError(f"--resume: the newest checkpoint is of step {step}, and run.steps is {config.run.steps}")
    if step == 0 and launch.is_main:
        note("no checkpoint was saved yet: the run begins again")
    return step


def build_checkpoints(config: Config, folder: RunFiles, launch: Launch, *states: HasState) -> Checkpointer:
    return Checkpointer(
        folder.checkpoints,
        States(*states),
        every=config.run.save_every,
        last_step=config.run.steps,
        keep=config.run.keep_checkpoints,
        layout=checkpoint_layout(config, launch),
        is_main=launch.is_main,
    )
