"""gkd launch"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from gkd.environment import die_with_parent, shell_status
from gkd.errors import InputError, RunInterruptedError


def launch_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND ...", help="torchrun ... or deepspeed ...")],
) -> None:
    """Run a launcher so that signals reach the ranks, and the run's exit code comes back.

    gkd launch -- torchrun --nproc_per_node 2 -m gkd train CONFIG

    SIGUSR1 and SIGTERM go to the ranks on this machine alone, which finish their step and save. A launcher would end on
    the first, end the ranks on the second, and turn every code but 0 into 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "exit.json"
        try:
            launcher = subprocess.Popen(
                command,
                env={**os.environ, "GKD_EXIT_FILE": str(copy)},
                preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
            )
        except OSError as error:
            raise InputError(f"gkd launch: {command[0]}: {error.strerror}") from None
        forwarder = _Forwarder(launcher.pid)
        code = launcher.wait()
        with suppress(OSError, ValueError, KeyError):
            code = json.loads(copy.read_text())["status"] if code else 0
    sys.exit(RunInterruptedError.exit_code if forwarder.found_no_rank else shell_status(code))


class _Forwarder:
    """Hands the signals of this process on, from when it is made."""

    def __init__(self, launcher_pid: int) -> None:
        self.found_no_rank = False
        self._launcher_pid = launcher_pid
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        ranks = list(_ranks_below(self._launcher_pid))
        self.found_no_rank = not ranks  # it is only starting
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if not ranks:
            with suppress(ProcessLookupError):
                os.kill(self._launcher_pid, signal.SIGTERM)


def _ranks_below(pid: int) -> Iterator[int]:
    """The processes that a launcher gave a rank, not those that they started in turn."""
    for child in _children(pid):
        with suppress(OSError):
            if b"\0RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                yield child
            else:
                yield from _ranks_below(child)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            children += map(int, (thread / "children").read_text().split())
    return children
