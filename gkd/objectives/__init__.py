"""Divergences, terms and reductions as pure functions: the truth that kernels and ops are tested against.

Names load on first use: a config knows the terms' options without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "BYPRODUCTS": "byproducts",
    "Definition": "closed_forms",
    "HardLabels": "hard_label",
    "REDUCTIONS": "reduction",
    "reduce_rows": "reduction",
    "register_divergence": "closed_forms",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gkd.objectives' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gkd.objectives.{_HOMES.get(name, 'divergence')}"), name)
