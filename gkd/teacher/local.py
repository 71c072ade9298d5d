"""A teacher beside the student: frozen, in eval mode, one forward a micro-batch, no logits kept.

Legend: B sequences, T positions, H_t the teacher's hidden size, n_i completion tokens of rollout i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gkd.data.order import longest_first
from gkd.errors import RunError
from gkd.models import backbone_of, output_head
from gkd.system_errors import memory_for
from gkd.types import HiddenScores, OutputHead, Rollout, TeacherScores

_LESS_MEMORY = "lower teacher.micro_batch_size, which changes no result, or shard the teacher or serve it (placement)"
Backbone = Callable[..., Any]  # called as a transformers backbone is
Placing = Callable[[Any, torch.device], tuple[Backbone, OutputHead]]


def whole(model: Any, device: torch.device) -> tuple[Backbone, OutputHead]:
    """The teacher on one device."""
    model.to(device)
    return backbone_of(model), output_head(model)


class LocalTeacher:
    """Implements `Teacher` with a transformers model in this process.

    Scores are bitwise the same for the same rollouts in the same order.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        micro_batch_size: int,
        pad_token_id: int,
        place: Placing = whole,
        agree_on_largest: Callable[[int], int] = lambda count: count,
    ) -> None:
        """`place` puts the frozen model on the device. Where that shards it, all ranks must run as many forwards:
        `agree_on_largest` returns the largest of their counts."""
        self._model = model.eval().requires_grad_(False)
        self._backbone, self._head = place(self._model, device)
        self._device = device
        self._micro_batch_size = micro_batch_size
        self._pad_token_id = pad_token_id
        self._agree_on_largest = agree_on_largest

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Hidden states after the final norm, [n_i, H_t] for each rollout, in the teacher's dtype."""
        self._assert_frozen()
        nothing = self._head.weight.new_empty(0, self._head.weight.shape[1])
        hidden = [nothing] * len(rollouts)
        order = longest_first([len(rollout.token_ids) for rollout in rollouts])
        scored = [i for i in order if rollouts[i].completion_ids]
        starts = range(0, len(scored), self._micro_batch_size)
        idle = self._agree_on_largest(len(starts)) - len(starts)  # asked for before any forward: that may be collective
        for start in starts:
            rows = scored[start : start + self._micro_batch_size]
            with memory_for("the teacher's forward", _LESS_MEMORY):
                found = self._forward([rollouts[i] for i in rows])
            for i, states in zip(rows, found, strict=True):
                hidden[i] = states
        for _ in range(idle):
            self._backbone(input_ids=torch.tensor([[self._pad_token_id]], device=self._device), use_cache=False)
        return [HiddenScores(states, self._head) for states in hidden]

    def _forward(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        longest = max(len(r.token_ids) for r in rollouts)
        ids = torch.full((len(rollouts), longest), self._pad_token_id)  # [B, T]
        for row, rollout in enumerate(rollouts):
            ids[row, : len(rollout.token_ids)] = torch.tensor(rollout.token_ids)
        # padded on the right, so the causal mask alone keeps padding out of every state that is used
        states = self._backbone(input_ids=ids.to(self._device), use_cache=False).last_hidden_state  # [B, T, H_t]
        # position t predicts token t + 1, so the completion's first token is predicted by the prompt's last
        return [
            states[row, len(r.draw.prompt.token_ids) - 1 : len(r.token_ids) - 1].clone()
            for row, r in enumerate(rollouts)
        ]

    def _assert_frozen(self) -> None:
        if self._model.training or any(p.requires_grad for p in self._model.parameters()):
            raise RunError("the teacher must be frozen and in eval mode, but something switched it to training")
