"""Jobs whose results stay on the disk, done by a few processes of one thread each: tiny models gain nothing by more.

A job that finds its result has nothing to do, so a table that was cut off goes on; what is lost are the running jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.environment import LAUNCHER_VARIABLES

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """`work(*arguments)` makes `target` and returns what is to be said of it. `cost` is in any unit, one for all."""

    label: str
    target: Path
    work: Callable[..., str]
    arguments: tuple[Any, ...]
    cost: float = 1.0


class Workers:
    """The processes, which load their libraries once. To be used in a `with` statement."""

    def __init__(self, count: int, say: Say) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read where torch loads: in the workers, not here
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start_worker)
        self._say = say

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """After an error nothing new is begun, and nobody waits for what is running."""
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> None:
        """Does what is not done yet, in the order given. Raises what the first failed job raised."""
        missing = [job for job in jobs if not job.target.exists()]
        if len(missing) < len(jobs):
            self._say(f"{len(jobs) - len(missing)} of {len(jobs)} were made before")
        progress = _Progress(missing, self._say)
        running: dict[Future[str], Job] = {self._pool.submit(job.work, *job.arguments): job for job in missing}
        for future in as_completed(running):
            progress.done(running[future], future.result())


class _Progress:
    """One line a job, with the time that the other jobs given take at the speed so far."""

    def __init__(self, jobs: Sequence[Job], say: Say) -> None:
        self._cost, self._count, self._say = sum(job.cost for job in jobs), len(jobs), say
        self._finished, self._spent, self._started_s = 0, 0.0, time.monotonic()

    def done(self, job: Job, said: str) -> None:
        self._finished, self._spent = self._finished + 1, self._spent + job.cost
        left_s = (time.monotonic() - self._started_s) * max(0.0, self._cost / self._spent - 1.0)
        self._say(f"[{self._finished}/{self._count}] {job.label}: {said}; about {left_s / 60:.0f} min left")


def _start_worker() -> None:
    """Ctrl-C ends a worker without a traceback: the parent says what there is to say. A launcher's variables would make
    all workers one process group, at one port."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
