"""Hidden states of completions, by forwards in this process: padded micro-batches, the longest first, no logits kept.

Legend: B sequences, T positions, H_t the teacher's hidden size, n_i completion tokens of rollout i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from gkd.data.order import longest_first
from gkd.models.layer_states import Source
from gkd.system_errors import memory_for
from gkd.types import HiddenScores, OutputHead, Rollout, StatePlace, TeacherScores, WhichTokens

_LESS_MEMORY = "lower teacher.micro_batch_size, which changes no result, or shard the teacher or serve it (placement)"
States = tuple[torch.Tensor, Mapping[Source, torch.Tensor]]  # [B, T, H_t]: the last ones, and those of layers


class ScoringForwards:
    """Implements `Teacher`, for whoever has the states and the head. Same rollouts, same order: bitwise same scores."""

    def __init__(
        self,
        *,
        device: torch.device,
        micro_batch_size: int,
        pad_token_id: int,
        agree_on_largest: Callable[[int], int] = lambda count: count,
        state_places: Mapping[StatePlace, int] | None = None,
    ) -> None:
        """Where forwards are collective, all ranks must run as many: `agree_on_largest` returns the largest of their
        counts. Scores carry the states of `state_places`, which have these widths."""
        self._device = device
        self._micro_batch_size = micro_batch_size
        self._pad_token_id = pad_token_id
        self._agree_on_largest = agree_on_largest
        self._state_places = state_places or {}

    def _states(self, ids: torch.Tensor) -> States:
        """Of [B, T]: the last ones, and those of the layers that are asked for."""
        raise NotImplementedError

    def _output_head(self) -> OutputHead:
        """Asked for once in `score`; may be collective."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Hidden states after the final norm, [n_i, H_t] for each rollout, in the dtype that they are computed in."""
        head = self._output_head()
        nothing = head.weight.new_empty(0, head.weight.shape[1])
        order = longest_first([len(rollout.token_ids) for rollout in rollouts])
        scored = [i for i in order if rollouts[i].completion_ids]
        empty = HiddenScores(
            nothing, head, {place: nothing.new_empty(0, width) for place, width in self._state_places.items()}
        )
        scores: list[TeacherScores] = [empty] * len(rollouts)
        starts = range(0, len(scored), self._micro_batch_size)
        idle = self._agree_on_largest(len(starts)) - len(starts)  # asked for before any forward: that may be collective
        for start in starts:
            rows = scored[start : start + self._micro_batch_size]
            with memory_for("the teacher's forward", _LESS_MEMORY):
                found = self._forward([rollouts[i] for i in rows], head)
            for i, one in zip(rows, found, strict=True):
                scores[i] = one
        for _ in range(idle):
            self._states(torch.tensor([[self._pad_token_id]], device=self._device))
        return scores

    def _forward(self, rollouts: Sequence[Rollout], head: OutputHead) -> list[HiddenScores]:
        longest = max(len(r.token_ids) for r in rollouts)
        ids = torch.full((len(rollouts), longest), self._pad_token_id)  # [B, T]
        for row, rollout in enumerate(rollouts):
            ids[row, : len(rollout.token_ids)] = torch.tensor(rollout.token_ids)
        # padded on the right, so the causal mask alone keeps padding out of every state that is used
        states, layers = self._states(ids.to(self._device))  # [B, T, H_t]
        return [
            HiddenScores(
                _of_tokens(states[row], rollout, "scored"),
                head,
                {place: _of_tokens(layers[place.source][row], rollout, place.tokens) for place in self._state_places},
            )
            for row, rollout in enumerate(rollouts)
        ]


def _of_tokens(states: torch.Tensor, rollout: Rollout, tokens: WhichTokens) -> torch.Tensor:
    """A copy of what is asked for of a row [T, H_t], without the padding."""
    end = len(rollout.token_ids)
    if tokens == "all":
        return states[:end].clone()
    # position t predicts token t + 1, so the completion's first token is predicted by the prompt's last
    return states[len(rollout.draw.prompt.token_ids) - 1 : end - 1].clone()
