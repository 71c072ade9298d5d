"""A teacher on other machines: `gkd serve-teacher` computes the hidden states, the loss stays here.

Legend: H_t the teacher's hidden size, n_i completion tokens of rollout i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError

from gkd.errors import TeacherError
from gkd.models.head_bytes import head_from_bytes
from gkd.teacher.replicas import Replicas
from gkd.types import HiddenScores, OutputHead, Rollout, TeacherScores


class ServedTeacher:
    """Implements `Teacher` with requests to the servers of `replicas`, one a rollout, many at once.

    The output head is fetched here, once, and stays on `device`.
    """

    def __init__(self, replicas: Replicas, *, device: torch.device) -> None:
        """Raises TeacherError for a head that is not what its server promised."""
        self._replicas, self._device = replicas, device
        self._dtype: torch.dtype = getattr(torch, replicas.served.dtype)
        self._head = self._fetch_head()

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Hidden states after the final norm, [n_i, H_t] for each rollout, in the served dtype.

        Raises TeacherError, and stops using the servers, if a rollout cannot be scored.
        """
        nothing = torch.empty(0, self._replicas.served.hidden_size, dtype=self._dtype)
        answers = self._replicas.ask_for_each(self._states, rollouts, nothing)
        return [HiddenScores(states.to(self._device), self._head) for states in answers]

    def _states(self, rollout: Rollout) -> torch.Tensor:
        # the row of token t predicts token t + 1: the last token has none to predict, so it need not be read
        first_row = len(rollout.draw.prompt.token_ids) - 1
        return self._replicas.states(rollout.token_ids[:-1], first_row, rollout.sample_id)

    def _fetch_head(self) -> OutputHead:
        served = self._replicas.served
        try:
            head = head_from_bytes(self._replicas.head(), self._device)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TeacherError(f"{served.model}: its server sent no output head that can be read: {error}") from None
        shape = (served.vocabulary_rows, served.hidden_size)
        if tuple(head.weight.shape) != shape or head.weight.dtype != self._dtype:
            raise TeacherError(
                f"{served.model}: its server sent an output head of {list(head.weight.shape)} {head.weight.dtype} and "
                f"promised {list(shape)} {self._dtype}"
            )
        return head
