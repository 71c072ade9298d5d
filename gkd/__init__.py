"""gkd: on-policy and generalized knowledge distillation of language models.

Public names load on first use, so that `import gkd` costs milliseconds. The losses need torch alone, `Distiller`
needs `gkd[train]`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd.config import Config, load_config
    from gkd.errors import GkdError
    from gkd.ops import divergence, linear_divergence, topk_divergence
    from gkd.train.distiller import Distiller

__version__ = "0.2.0.dev0"
__all__ = ["Config", "Distiller", "GkdError", "divergence", "linear_divergence", "load_config", "topk_divergence"]

_HOMES = {
    "Config": "gkd.config",
    "Distiller": "gkd.train.distiller",
    "GkdError": "gkd.errors",
    "divergence": "gkd.ops",
    "linear_divergence": "gkd.ops",
    "load_config": "gkd.config",
    "topk_divergence": "gkd.ops",
}
_EXTRAS = {"gkd.config": "cli", "gkd.train.distiller": "train"}  # what they need beyond the core


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gkd' has no attribute {name!r}")
    home = _HOMES[name]
    if home in _EXTRAS:
        from gkd.extras import require

        require(f"gkd.{name}", _EXTRAS[home])
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
