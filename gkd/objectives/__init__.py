"""Divergences and reductions as pure functions: the truth that kernels and ops are tested against."""

from gkd.objectives.byproducts import BYPRODUCTS
from gkd.objectives.closed_forms import Definition, register_divergence
from gkd.objectives.divergence import (
    KINDS,
    Divergence,
    MixedKl,
    RowScores,
    divergence_value,
    score_rows,
    value_and_gradient,
)
from gkd.objectives.hard_label import HardLabels
from gkd.objectives.reduction import REDUCTIONS, reduce_rows

__all__ = [
    "BYPRODUCTS",
    "KINDS",
    "REDUCTIONS",
    "Definition",
    "Divergence",
    "HardLabels",
    "MixedKl",
    "RowScores",
    "divergence_value",
    "reduce_rows",
    "register_divergence",
    "score_rows",
    "value_and_gradient",
]
