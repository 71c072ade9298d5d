"""The ways to distil that are compared, each a few settings of gkd, and which of them run with how many seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gkd.bench.sizes import Size

Completions = Literal["data", "teacher", "teacher_greedy"]
Signal = Literal["teacher", "labels", "fixed_negative", "fixed_negative_slow"]
SLOW = 1 / 30  # of the learning rate, at which the other control destroys its student
LAMBDAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Objective:
    """A divergence of gkd; `label` is how the table calls it."""

    label: str
    kind: str
    beta: float = 0.5
    alpha: float = 0.1


OBJECTIVES = (
    Objective("forward KL", "forward_kl"),
    Objective("JSD(0.1)", "jsd", beta=0.1),
    Objective("JSD(0.5)", "jsd", beta=0.5),
    Objective("JSD(0.9)", "jsd", beta=0.9),
    Objective("reverse KL", "reverse_kl"),
    Objective("skew KL(0.1)", "skew_forward_kl", alpha=0.1),
)
FORWARD, REVERSE, JSD = OBJECTIVES[0], OBJECTIVES[4], OBJECTIVES[2]


@dataclass(frozen=True)
class Method:
    """`student_share` is lambda; the other completions are those of `completions`.

    `signal` says what the loss is made of: the teacher's distributions, the completions as labels, or, in the control,
    the same push away from every sampled token.
    """

    label: str
    group: Literal["start", "baseline", "grid", "temperature", "control"]
    student_share: float
    objective: Objective = FORWARD
    completions: Completions = "data"
    signal: Signal = "teacher"
    sampling_temperature: float = 1.0
    loss_temperature: float = 1.0
    longer: bool = False  # the control's number of tokens


START = Method("initial student", "start", 0.0, signal="labels")
SFT = Method("SFT", "baseline", 0.0, signal="labels")
SEQKD = Method("SeqKD, sampled at T = 1", "baseline", 0.0, completions="teacher", signal="labels")
SEQKD_GREEDY = Method("SeqKD, greedy", "baseline", 0.0, completions="teacher_greedy", signal="labels")
LONGER = Method("SFT, longer", "control", 0.0, signal="labels", longer=True)
FIXED_NEGATIVE = Method("fixed negative advantage", "control", 1.0, signal="fixed_negative")
FIXED_NEGATIVE_SLOW = Method("fixed negative advantage, 1/30 of the rate", "control", 1.0, signal="fixed_negative_slow")


def gkd(objective: Objective, student_share: float) -> Method:
    return Method(f"{objective.label}, λ = {student_share:g}", "grid", student_share, objective)


SUPERVISED_KD = gkd(FORWARD, 0.0)
ON_POLICY = tuple(gkd(objective, 1.0) for objective in OBJECTIVES)
MAIN = (START, SFT, SEQKD, SEQKD_GREEDY, LONGER, FIXED_NEGATIVE, FIXED_NEGATIVE_SLOW, SUPERVISED_KD, *ON_POLICY)
GRID = tuple(gkd(objective, share) for objective in OBJECTIVES for share in LAMBDAS)
SWEPT = (START, SUPERVISED_KD, gkd(FORWARD, 1.0), gkd(REVERSE, 1.0))
WARMER = tuple(
    replace(
        gkd(objective, 1.0),
        label=f"{objective.label}, λ = 1, {name}",
        group="temperature",
        sampling_temperature=sampling,
        loss_temperature=loss,
    )
    for objective in (FORWARD, JSD, REVERSE)
    for name, sampling, loss in (("sampled at T = 0.5", 0.5, 1.0), ("loss at T = 2", 1.0, 2.0))
)


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
