"""Weights of single tokens: one a file, and the table of their names.

A weight is detached: it scales a token's value and gradient, and has no gradient of its own. Those of a term are
multiplied. A new one is a subclass of `RowWeight` or `SequenceWeight` and an entry of TOKEN_WEIGHTS, here or in a
plugin.
"""

from gkd.objectives.token_weights.base import RowWeight, SequenceWeight, TokenWeight
from gkd.registry import Registry

_HERE = "gkd.objectives.token_weights"

TOKEN_WEIGHTS: Registry[type[TokenWeight]] = Registry(
    "token weight",
    {
        "teacher_entropy": f"{_HERE}.entropy:TeacherEntropy",
        "student_entropy": f"{_HERE}.entropy:StudentEntropy",
        "divergence": f"{_HERE}.divergence:DivergenceWeight",
        "uncertain_or_wrong": f"{_HERE}.uncertain_or_wrong:UncertainOrWrong",
        "drift": f"{_HERE}.drift:Drift",
        "adaptive": f"{_HERE}.adaptive:Adaptive",
        "importance": f"{_HERE}.importance:Importance",
    },
)

__all__ = ["TOKEN_WEIGHTS", "RowWeight", "SequenceWeight", "TokenWeight"]
