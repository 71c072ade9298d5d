"""The ways to distil that the GKD paper compares, each a few settings of gkd, and which run with how many seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gkd.bench.sizes import Size

Completions = Literal["data", "teacher", "teacher_greedy"]
Keys = Mapping[str, Any]  # of a section of the config
SLOW = 1 / 30  # of the learning rate, at which the other control destroys its student
LAMBDAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Objective:
    """A divergence of gkd; `label` is how the table calls it."""

    label: str
    keys: Keys = field(hash=False)


OBJECTIVES = (
    Objective("forward KL", {"kind": "forward_kl"}),
    Objective("JSD(0.1)", {"kind": "jsd", "beta": 0.1}),
    Objective("JSD(0.5)", {"kind": "jsd", "beta": 0.5}),
    Objective("JSD(0.9)", {"kind": "jsd", "beta": 0.9}),
    Objective("reverse KL", {"kind": "reverse_kl"}),
    Objective("skew KL(0.1)", {"kind": "skew_forward_kl", "alpha": 0.1}),
)
FORWARD, JSD, REVERSE, SKEW = OBJECTIVES[0], OBJECTIVES[2], OBJECTIVES[4], OBJECTIVES[5]


@dataclass(frozen=True)
class Method:
    """`mixture`, `objective` and `rollout` are what these sections of the config say beside what all cells share.

    `completions` are those of the source `dataset`. `beside` is the method that differs in nothing but what this one
    is about.
    """

    label: str
    group: Literal["start", "baseline", "grid", "temperature", "control", "addition"]
    mixture: Keys = field(hash=False)
    objective: Keys = field(hash=False)
    rollout: Keys = field(default_factory=dict[str, Any], hash=False)
    completions: Completions = "data"
    lr_factor: float = 1.0
    longer: bool = False  # the control's number of tokens
    beside: str = ""
    evaluations: int = 0  # of the divergence that a rule of the objective follows, while it trains
    through_assistant: bool = False  # half of the tokens train an assistant, which is then the student's teacher

    @property
    def student_share(self) -> float:
        """Lambda."""
        return self.mixture["student"]


def share(student: float) -> dict[str, float]:
    return {"student": student, "dataset": 1.0 - student}


_LABELS = {"kind": "cross_entropy"}
_FIXED_NEGATIVE = {"kind": "policy_gradient", "advantage": "constant", "constant": -1.0}

START = Method("initial student", "start", share(0.0), _LABELS)
SFT = Method("SFT", "baseline", share(0.0), _LABELS)
SEQKD = Method("SeqKD, sampled at T = 1", "baseline", share(0.0), _LABELS, completions="teacher")
SEQKD_GREEDY = Method("SeqKD, greedy", "baseline", share(0.0), _LABELS, completions="teacher_greedy")
LONGER = Method("SFT, longer", "control", share(0.0), _LABELS, longer=True)
FIXED_NEGATIVE = Method("fixed negative advantage", "control", share(1.0), _FIXED_NEGATIVE)
FIXED_NEGATIVE_SLOW = replace(FIXED_NEGATIVE, label="fixed negative advantage, 1/30 of the rate", lr_factor=SLOW)


def gkd(objective: Objective, student_share: float) -> Method:
    return Method(f"{objective.label}, λ = {student_share:g}", "grid", share(student_share), objective.keys)


SUPERVISED_KD = gkd(FORWARD, 0.0)
ON_POLICY = tuple(gkd(objective, 1.0) for objective in OBJECTIVES)
MAIN = (START, SFT, SEQKD, SEQKD_GREEDY, LONGER, FIXED_NEGATIVE, FIXED_NEGATIVE_SLOW, SUPERVISED_KD, *ON_POLICY)
GRID = tuple(gkd(objective, student_share) for objective in OBJECTIVES for student_share in LAMBDAS)
SWEPT = (START, SUPERVISED_KD, gkd(FORWARD, 1.0), gkd(REVERSE, 1.0))


def _warmer(objective: Objective) -> tuple[Method, Method]:
    plain = replace(gkd(objective, 1.0), group="temperature")
    return (
        replace(plain, label=f"{plain.label}, sampled at T = 0.5", rollout={"temperature": 0.5}),
        replace(plain, label=f"{plain.label}, loss at T = 2", objective={**objective.keys, "temperature": 2.0}),
    )


WARMER = tuple(method for objective in (FORWARD, JSD, REVERSE) for method in _warmer(objective))


@dataclass(frozen=True)
class Cell:
    method: Method
    seed: int


def cells(size: Size) -> list[Cell]:
    """What the table is made of, what matters most first: a run that is cut off has the comparison's core."""
    main = [Cell(method, seed) for seed in range(size.seeds) for method in MAIN]
    grid = [Cell(method, seed) for seed in range(size.seeds) for method in GRID if method not in MAIN]
    warmer = [Cell(method, seed) for seed in range(size.seeds) for method in WARMER]
    more = [Cell(method, seed) for seed in range(size.seeds, size.main_seeds) for method in MAIN]
    return [*main, *grid, *warmer, *more]
