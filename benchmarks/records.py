"""Where results lie, and how a benchmark says what it found. Python alone is enough for it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def command() -> str:
    """The command line that this process was started with, as a reader starts it again."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "benchmarks are started with python -m"
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(number: float, digits: int = 4) -> float:
    """To so many significant digits: more than a measurement has would only be read as more."""
    return float(f"{number:.{digits}g}")


def say(line: str) -> None:
    """Progress, at once even where the output is a file."""
    print(line, flush=True)
