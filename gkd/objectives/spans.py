"""A span of several tokens, as two outcomes: that it was written as it stands there, or otherwise.

Legend: S spans, pi the probability of a span: the product of the conditional probabilities of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence, score_rows


@dataclass(frozen=True)
class SpanScores:
    """All [S] and detached."""

    value: Tensor
    gradient: Tensor  # by log pi of the student
    byproducts: dict[str, Tensor]  # of gkd.objectives.BYPRODUCTS


@torch.no_grad()
def score_spans(student_log_pi: Tensor, teacher_log_pi: Tensor, divergence: Divergence) -> SpanScores:
    """The divergence between (pi, 1 - pi) of both sides, from log pi [S] at the divergence's temperature.

    With G the gradient by the log-probabilities of both outcomes, that by log pi is G_1 - G_2 pi / (1 - pi). A pi of 1
    counts as the next number below: what it is multiplied by then, the gradient of log pi, vanishes with 1 - pi.
    """
    at_one = replace(divergence, temperature=1.0)
    student, teacher = (_outcomes(log_pi) for log_pi in (student_log_pi, teacher_log_pi))
    gradient = torch.empty_like(student)  # [S, 2]
    scores = score_rows(student, teacher, at_one, gradient=gradient, byproducts=True)
    odds = (student[:, 0] - student[:, 1]).exp()  # [S] pi / (1 - pi)
    scale = divergence.scale / at_one.scale  # T^2 or 1
    return SpanScores(scores.value * scale, (gradient[:, 0] - gradient[:, 1] * odds) * scale, scores.byproducts)


def _outcomes(log_pi: Tensor) -> Tensor:
    """Their log-probabilities [S, 2]."""
    log_pi = log_pi.clamp(max=-torch.finfo(log_pi.dtype).eps)
    return torch.stack([log_pi, torch.log(-torch.expm1(log_pi))], -1)
