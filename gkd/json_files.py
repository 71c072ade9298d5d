"""JSON: what a user names is read, or refused in one line that says where; what is no number is written as null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gkd.errors import InputError


def read_json_object(path: Path, error: type[InputError], key: str = "") -> dict[str, Any]:
    """The object in a file. Raises `error`, starting with the config key if there is one, with file:line."""
    where = f"{key}: {path}" if key else f"{path}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{where}: {cause}") from None
    except json.JSONDecodeError as cause:
        raise error(f"{where}:{cause.lineno}: {cause.msg}") from None
    if not isinstance(values, dict):
        raise error(f"{where}:1: expected a JSON object")
    return values


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinities that all readers accept."""
    return value if math.isfinite(value) else None
