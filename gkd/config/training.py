"""What the student's training is told of a run, and no more."""

from __future__ import annotations

from typing import Self

from gkd.config import Config, DeepSpeedConfig, Dtype, ObjectiveSection, OptimConfig, default_objective
from gkd.schema import Section


class TrainingSettings(Section):
    """Parts of a run's config, by the names that they have there; `TrainingSettings.model_validate` makes one alone."""

    steps: int = 100
    seed: int = 0
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    longest_sequence: int = 1  # tokens
    objective: ObjectiveSection = default_objective()
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()  # pyright: ignore[reportCallIssue]

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            steps=config.run.steps,
            seed=config.run.seed,
            dtype=config.student.dtype,  # pyright: ignore[reportArgumentType]  # of a settled config; anything else raises
            gradient_checkpointing=config.student.gradient_checkpointing,
            compile=config.student.compile,
            longest_sequence=config.longest_sequence,
            objective=config.objective,
            optim=config.optim,
            deepspeed=config.deepspeed,
        )
