"""The student as its own teacher, computed by the student in training: no second model, and no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from gkd.teacher.scoring import ScoringForwards, States
from gkd.types import OutputHead


class TrainedStudent(Protocol):
    """The student in training. Both are collective where its weights are sharded."""

    def hidden_states(self, input_ids: torch.Tensor, *, with_adapter: bool = True) -> torch.Tensor:
        """What the output head reads, [B, T, H]; `with_adapter` False: as a LoRA student was before training."""
        ...

    def output_head(self) -> OutputHead: ...


class StudentItself(ScoringForwards):
    """Implements `Teacher` with the student's weights of the step, or with those below its adapter.

    Its scores hold the student's own head: they are good until the student's next step.
    """

    def __init__(
        self,
        student: TrainedStudent,
        *,
        with_adapter: bool,
        device: torch.device,
        micro_batch_size: int,
        pad_token_id: int,
        agree_on_largest: Callable[[int], int],
    ) -> None:
        """`with_adapter` False is of a LoRA student, as it was before training."""
        super().__init__(
            device=device,
            micro_batch_size=micro_batch_size,
            pad_token_id=pad_token_id,
            agree_on_largest=agree_on_largest,
        )
        self._student, self._with_adapter = student, with_adapter

    def _output_head(self) -> OutputHead:
        return self._student.output_head()

    def _states(self, ids: torch.Tensor) -> States:
        return self._student.hidden_states(ids, with_adapter=self._with_adapter), {}
