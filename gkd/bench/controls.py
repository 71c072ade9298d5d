"""The two signals that need no teacher: labels alone, and a fixed negative advantage.

Legend: N scored tokens, n_i completion tokens of rollout i, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gkd.config import ObjectiveConfig
from gkd.train.engine import StudentEngine
from gkd.train.module import DivergenceSums
from gkd.types import HiddenScores, OutputHead, Rollout, TeacherScores, TokenBatch

LABELS_ALONE = ObjectiveConfig(kind="forward_kl", hard_label_weight=1.0)  # pyright: ignore[reportCallIssue]


class NoTeacher:
    """Stands where a teacher would. Its states are zeros of width 1, which say the same of every token."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._head = OutputHead(torch.zeros(vocabulary, 1, device=device))

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        lengths = (len(rollout.completion_ids) for rollout in rollouts)
        return [HiddenScores(torch.zeros(n, 1, device=self._device), self._head) for n in lengths]


class FixedNegativeAdvantage(StudentEngine):
    """Policy gradient with the advantage -1 for every sampled token: the loss is the mean of log p(token).

    On-policy distillation by the reverse KL is policy gradient whose advantages are mostly negative, so a part of what
    it does could be had by lowering whatever was sampled. This control does only that: its loss is the cross-entropy
    of the student's own tokens with the sign turned, and no teacher is in it.
    """

    def _forward_backward(self, micro_batch: TokenBatch, total_weight: float) -> DivergenceSums:
        own_tokens = replace(micro_batch, hard_label=torch.ones_like(micro_batch.hard_label))
        sums: DivergenceSums = self._engine(own_tokens.to(self._device), LABELS_ALONE)
        self._engine.backward(-sums.loss / max(total_weight, 1e-30), scale_wrt_gas=False)
        return sums._replace(loss=-sums.loss)
