"""Jobs whose results stay on the disk, done by a few processes.

A job that finds its result has nothing to do, so a table that was cut off goes on; what is lost are the running jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.environment import LAUNCHER_VARIABLES

Say = Callable[[str], None]
CUT_OFF = "stopped; the same command goes on from here"


@dataclass(frozen=True)
class Job:
    """`work(*arguments)` makes `target` and returns what is to be said of it. `cost` is in any unit, one for all."""

    label: str
    target: Path
    work: Callable[..., str]
    arguments: tuple[Any, ...]
    cost: float = 1.0


class Workers:
    """The processes. To be used in a `with` statement.

    `threads` of each; None: as many as it likes. `is_fresh`: a process does one job, and what that held is free again;
    else it loads its libraries once.
    """

    def __init__(self, count: int, say: Say, *, threads: int | None = 1, is_fresh: bool = False) -> None:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read where torch loads: in the workers, not here
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _start_worker, max_tasks_per_child=1 if is_fresh else None)
        self._say = say

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """After an error nothing new is begun, and what is running is ended: the interpreter would wait for it."""
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> None:
        """Does what is not done yet, in the order given. Raises what the first failed job raised."""
        missing = [job for job in jobs if not job.target.exists()]
        if len(missing) < len(jobs):
            self._say(f"{len(jobs) - len(missing)} of {len(jobs)} were made before")
        progress = _Progress(missing, self._say)
        running: dict[Future[str], Job] = {self._pool.submit(job.work, *job.arguments): job for job in missing}
        for future in as_completed(running):
            progress.done(running[future], future.result())


def run_stages(workers: Workers, stages: Iterable[Sequence[Job]]) -> None:
    """Everything that is not there yet, one stage after another. Exits at a signal: what is finished is kept."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(CUT_OFF))
    try:
        with workers:
            for jobs in stages:
                workers.run(jobs)
    except KeyboardInterrupt:
        sys.exit(CUT_OFF)


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
