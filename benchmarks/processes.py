"""Processes that must not hang. Python alone is enough for it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from benchmarks.records import ROOT

OK = "ok"


def ended(
    command: Sequence[str | Path], log: TextIO, limit_s: float, environment: Mapping[str, str] | None = None
) -> str:
    """Runs it in the repository, its output in `log`. Returns OK, or how it failed; at its limit the process is ended
    with all that it started."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(max(0.0, limit_s))
        return OK if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        return "stopped at its limit"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
