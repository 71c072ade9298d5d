"""The student as it was before training, which a term may hold the student to."""

from __future__ import annotations

from typing import Any

import torch

from gkd.models import backbone_of, output_head, packed_inputs
from gkd.types import HiddenScores, TokenBatch


class InitialStudent:
    """A frozen copy, whole on every rank. `model` computes in the dtype that it is in."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> HiddenScores:
        """Of the scored tokens of a micro-batch on the model's device, padded or packed as it is."""
        packed = {} if batch.sequence_lengths is None else packed_inputs(batch.sequence_lengths, batch.input_ids.device)
        states = backbone_of(self._model)(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        return HiddenScores(states.flatten(0, 1)[batch.score_index], output_head(self._model))
