"""Data: rows read, rendered and tokenised, put in order, and packed.

Names are imported on first use: `gkd.data` itself imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd.data.formats import Row, read_rows
    from gkd.data.order import PromptData, calibration_texts
    from gkd.data.packing import pack
    from gkd.data.prompts import PromptSet, load_prompts, render_message

_HOME_OF = {
    "Row": "formats",
    "read_rows": "formats",
    "PromptData": "order",
    "calibration_texts": "order",
    "pack": "packing",
    "PromptSet": "prompts",
    "load_prompts": "prompts",
    "render_message": "prompts",
}

__all__ = ["PromptData", "PromptSet", "Row", "calibration_texts", "load_prompts", "pack", "read_rows", "render_message"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
