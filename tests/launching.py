"""Starting processes as a user would, with a hard time limit, because the usual failure is a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd.environment import without_launcher

REPOSITORY = Path(__file__).parent.parent
MakeConfig = Callable[..., Path]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what engines started in it have set."""
    own = {
        name: value for name, value in without_launcher().items() if not name.startswith(("VLLM_", "DS_", "PYTEST_"))
    }
    if extra.get("PYTHONPATH"):  # and this checkout, whichever one is installed
        extra["PYTHONPATH"] += f"{os.pathsep}{REPOSITORY}"
    return {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}


def run(
    arguments: Sequence[str | Path], *, timeout_s: float = 480, cwd: Path = REPOSITORY, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; output is captured. Raises TimeoutExpired after `timeout_s`."""
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_python(arguments: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *arguments], **options)  # pyright: ignore[reportArgumentType]


def run_gkd(arguments: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "gkd", *arguments], **options)


def torchrun(ranks: int, arguments: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """`arguments` is a script with its arguments, or "-m", module, ..."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return run_python([*launcher, *arguments], **options)


def check(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Fails with the output's end if the command failed."""
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def read_metrics(run_folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / name).read_text().splitlines()]
