"""The classic weighted sum of soft and hard targets (Hinton et al., arXiv 1503.02531, section 2).

Legend: N rows (scored tokens), V vocabulary, n rows of a tile.

    value_i = (1 - h_i) D_i + h_i CE_i,   CE = -log softmax(student_logits)[label] at temperature 1,
    g_i     = (1 - h_i) dD_i + h_i (softmax(student_logits) - onehot(label)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.objectives.reduction import weigh


@dataclass(frozen=True)
class HardLabels:
    """Labels and their weights h in [0, 1]. A negative label (-100) means that the row has none: h counts as 0."""

    labels: Tensor  # [N] integer
    weight: Tensor  # [N]

    def rows(self, rows: slice) -> HardLabels:
        return HardLabels(self.labels[rows], self.weight[rows])

    def mix(self, student_logits: Tensor, value: Tensor, gradient: Tensor | None, soft_scale: float) -> Tensor:
        """The mixed value [n]; the gradient [n, V] is multiplied by soft_scale and mixed in place.

        student_logits [n, V] are at temperature 1. A weight of exactly 0 or 1 drops the other term, inf included.
        """
        has_label = self.labels >= 0
        hard = torch.where(has_label, self.weight, 0.0).to(value.dtype)  # [n]
        labels = self.labels.clamp(min=0).unsqueeze(-1)  # [n, 1]
        log_sum = torch.logsumexp(student_logits, dim=-1, keepdim=True)  # [n, 1]
        cross_entropy = (log_sum - student_logits.gather(-1, labels)).squeeze(-1)  # [n]
        if gradient is not None:
            column = hard.unsqueeze(-1)  # [n, 1]
            gradient.mul_((1.0 - column) * soft_scale)
            gradient.addcmul_((student_logits - log_sum).exp_(), column)
            gradient.scatter_add_(-1, labels, -column)
        return weigh(value, 1.0 - hard) + weigh(cross_entropy, hard)
