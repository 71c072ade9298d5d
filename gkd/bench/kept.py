"""Parts that stay on the disk: named by what decides them, and read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkd.errors import RunError
from gkd.files import write_json


def short_name(*parts: Any) -> str:
    """Twelve hex digits; dataclasses count with all their fields."""
    text = json.dumps(parts, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def kept_result(target: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Writes what `make` returns. A run that gkd had to stop is a result too, and is kept with its reason."""
    try:
        done = make()
    except RunError as error:
        done = {"failed": f"{type(error).__name__}: {error}"}
    write_json(target, done)
    return done
