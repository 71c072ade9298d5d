"""The ways to distil that are compared, each a mixture and an objective of gkd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """`student_share` is lambda; the other completions are the teacher's, sampled at temperature 1.

    `longer`: trained on so many times the tokens of an on-policy method, as it takes less time for each.
    """

    label: str
    student_share: float
    terms: tuple[dict[str, Any], ...]
    longer: float = 1.0

    @property
    def mixture(self) -> dict[str, float]:
        return {"student": self.student_share, "teacher": 1.0 - self.student_share}


FORWARD, REVERSE, JSD = {"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "jsd", "beta": 0.5}

START = Method("initial student", 1.0, (FORWARD,), longer=0.0)
SFT = Method("SFT on the teacher's texts", 0.0, ({"kind": "cross_entropy"},), longer=2.0)
SUPERVISED_KD = Method("supervised KD: forward KL", 0.0, (FORWARD,), longer=1.5)
ON_POLICY_FORWARD = Method("on-policy, forward KL", 1.0, (FORWARD,))
ON_POLICY_REVERSE = Method("on-policy, reverse KL", 1.0, (REVERSE,))
ON_POLICY_JSD = Method("on-policy, JSD(0.5)", 1.0, (JSD,))
BY_SOURCE = Method(  # DistiLLM-2 (arXiv 2503.07067), its two skewed divergences with alpha fixed
    "skew KLs by source (DistiLLM-2)",
    0.5,
    (
        {"kind": "skew_forward_kl", "alpha": 0.1, "on": ["teacher"]},
        {"kind": "skew_reverse_kl", "alpha": 0.1, "on": ["student"]},
    ),
)
HALF = Method("half on-policy, forward KL", 0.5, (FORWARD,))  # the quickstart's

ALL = (SFT, SUPERVISED_KD, ON_POLICY_FORWARD, ON_POLICY_REVERSE, ON_POLICY_JSD, BY_SOURCE, HALF)
FEW = (SFT, SUPERVISED_KD, ON_POLICY_REVERSE)


@dataclass(frozen=True)
class Cell:
    method: Method
    seed: int
