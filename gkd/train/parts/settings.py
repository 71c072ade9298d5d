"""How student and teachers sample."""

from __future__ import annotations

from dataclasses import replace

from gkd.config import Config
from gkd.engines.sampling import SamplerSpec
from gkd.train.parts.models import Models
from gkd.types import SamplingSettings


def student_settings(config: Config, models: Models, step: int) -> SamplingSettings:
    """How the student samples at a step: `sampling_settings`, but for the length, which a schedule may limit."""
    return replace(sampling_settings(config, models), max_new_tokens=config.rollout.new_tokens_at(step))


def room_of_texts(config: Config, step: int) -> float:
    """Grows as schedules let the student's texts grow: the length of one, times the turns that it may have."""
    turns = 1 if config.environment is None else config.environment.turns_at(step)
    return float(config.rollout.new_tokens_at(step) * turns)


def sampling_settings(config: Config, models: Models) -> SamplingSettings:
    return SamplingSettings(
        max_new_tokens=config.rollout.most_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_token_ids=models.stop_token_ids,
        shared_vocab=models.valid_vocab,
    )


def sampler_spec(
    config: Config, models: Models, path: str, dtype: str, revision: str | None = None, *, key: str = "student.model"
) -> SamplerSpec:
    """`key` is what an error about the model starts with."""
    return SamplerSpec.of(
        config.rollout,
        model_folder=path,
        revision=revision,
        key=key,
        dtype=dtype,
        max_model_tokens=models.max_model_tokens,
        pad_token_id=models.pad_token_id,
        seed=config.run.seed,
    )
