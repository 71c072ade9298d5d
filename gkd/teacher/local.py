"""A teacher beside the student: frozen, in eval mode, one forward a micro-batch, no logits kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gkd.errors import RunError
from gkd.models import StateReader, backbone_of, output_head
from gkd.teacher.scoring import ScoringForwards, States
from gkd.types import OutputHead, Rollout, StatePlace, TeacherScores

Backbone = Callable[..., Any]  # called as a transformers backbone is
Placing = Callable[[Any, torch.device], tuple[Backbone, OutputHead]]


def whole(model: Any, device: torch.device) -> tuple[Backbone, OutputHead]:
    """The teacher on one device."""
    model.to(device)
    return backbone_of(model), output_head(model)


def whole_under_autocast(dtype: torch.dtype) -> Placing:
    """The same of float32 weights that are computed with in `dtype`, as a student's are in training."""

    def place(model: Any, device: torch.device) -> tuple[Backbone, OutputHead]:
        backbone, head = whole(model, device)

        def run(**inputs: Any) -> Any:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return backbone(**inputs)

        return run, head

    return place


class LocalTeacher(ScoringForwards):
    """Implements `Teacher` with a transformers model in this process."""

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        micro_batch_size: int,
        pad_token_id: int,
        place: Placing = whole,
        agree_on_largest: Callable[[int], int] = lambda count: count,
        state_places: Mapping[StatePlace, int] | None = None,
    ) -> None:
        """`place` puts the frozen model on the device; where that shards it, forwards are collective. The rest is as of
        `ScoringForwards`."""
        super().__init__(
            device=device,
            micro_batch_size=micro_batch_size,
            pad_token_id=pad_token_id,
            agree_on_largest=agree_on_largest,
            state_places=state_places,
        )
        self._model = model.eval().requires_grad_(False)
        self._reader = StateReader(model, "teacher.model") if state_places else None
        self._backbone, self._head = place(self._model, device)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Raises RunError if something switched the model to training."""
        if self._model.training or any(p.requires_grad for p in self._model.parameters()):
            raise RunError("the teacher must be frozen and in eval mode, but something switched it to training")
        return super().score(rollouts)

    def _output_head(self) -> OutputHead:
        return self._head

    def _states(self, ids: torch.Tensor) -> States:
        if self._reader is None:
            return self._backbone(input_ids=ids, use_cache=False).last_hidden_state, {}
        sources = {place.source for place in self._state_places}
        return self._reader.call(self._backbone, sources, input_ids=ids)
