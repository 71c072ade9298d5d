"""A pytest plugin: what a failed test started is ended, whoever its parent is by now.

A test that times out leaves its launcher's ranks, an engine's workers or a benchmark's runs behind; they would take the
processor from every later test. What fixtures started in an earlier phase is left alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

_MARK = "GKD_SUITE_PID"  # inherited by whatever this process starts, orphans too
_SHARED = (b"multiprocessing.resource_tracker", b"_inductor.compile_worker")  # one a process, for all of its tests


def pytest_configure() -> None:
    os.environ[_MARK] = str(os.getpid())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from _ending_what_fails())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from _ending_what_fails())


def _ending_what_fails() -> Generator[None, object, object]:
    before = started_here()
    try:
        return (yield)
    except pytest.skip.Exception:
        raise
    except BaseException:
        for pid in started_here() - before:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise


def started_here() -> set[int]:
    """The processes that this one started, directly or not: those that carry its mark, and its descendants."""
    parents, marked = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
            if any(name in command for name in _SHARED):
                parents.pop(pid)
            elif f"{_MARK}={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                marked.add(pid)
    return {pid for pid in parents if pid in marked or os.getpid() in _ancestors(pid, parents)} - {os.getpid()}


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found: list[int] = []
    while (pid := parents.get(pid, 0)) > 1 and pid not in found:
        found.append(pid)
    return found
