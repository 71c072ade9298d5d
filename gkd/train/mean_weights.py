"""The exponential mean of the student's weights, which may teach it: m <- d m + (1 - d) w after each optimizer step.

In float32, whole on every rank, and on every rank the same; it is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gkd.errors import CheckpointError, RunError
from gkd.train.engine import StudentEngine
from gkd.types import TokenBatch, WeightStream


class MeanWeights:
    """Implements `HasState`. `model` is a frozen transformers model that holds the mean.

    `version` counts the steps in it, as a sampler's weights are counted: a step is taught by the mean of just as many.
    """

    def __init__(self, model: Any, weights: WeightStream, *, name: str, decay: float, is_main: bool) -> None:
        """The mean begins as `weights`, the whole ones of a student that `model` has the architecture of."""
        self.model = model.float().eval().requires_grad_(False)
        self.version = 0
        self._parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        self._file, self._decay, self._is_main = f"teacher_{name}.safetensors", decay, is_main
        self._move(weights, 0.0)

    def check(self, step: int) -> None:
        """Raises RunError unless this is the mean that teaches `step`."""
        if self.version != step:
            raise RunError(f"step {step} would be taught by a mean of the student's weights of version {self.version}")

    def follow(self, weights: WeightStream, version: int) -> None:
        """Takes in the student's weights after a step. Collective."""
        self._move(weights, self._decay)
        self.version = version

    def save_state(self, folder: str) -> None:
        from safetensors.torch import save_file

        if self._is_main:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._parameters.items()}
            save_file(tensors, Path(folder) / self._file, metadata={"version": str(self.version)})

    def load_state(self, folder: str) -> None:
        """Raises CheckpointError if the checkpoint has no such mean."""
        from safetensors import safe_open

        path = Path(folder) / self._file
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no {self._file}, the mean of the student's weights")
        with safe_open(path, framework="pt") as file, torch.no_grad():
            self._check_names(file.keys())
            self.version = int(file.metadata()["version"])
            for name, own in self._parameters.items():
                own.copy_(file.get_tensor(name))

    @torch.no_grad()
    def _move(self, weights: WeightStream, decay: float) -> None:
        self._check_names(weights.shapes)
        for name, tensor in weights:
            own = self._parameters[name]
            own.lerp_(tensor.to(own), 1.0 - decay)

    def _check_names(self, names: Any) -> None:
        if set(names) != self._parameters.keys():
            raise RunError("the mean of the student's weights has other tensors than the student")


class FollowedStudent:
    """Implements the loop's `Student`: every step moves the means, which teach the next one."""

    def __init__(self, student: StudentEngine, means: Mapping[str, MeanWeights]) -> None:
        self._student, self._means = student, means

    def step(self, micro_batches: Sequence[TokenBatch], step: int) -> dict[str, float]:
        for mean in self._means.values():
            mean.check(step)
        metrics = self._student.step(micro_batches, step)
        for mean in self._means.values():
            mean.follow(self._student.whole_weights(), step + 1)
        return metrics

    def weights(self) -> WeightStream:
        return self._student.weights()
