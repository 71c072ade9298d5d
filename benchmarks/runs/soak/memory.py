"""How much memory processes hold while they live, and whether it stays that much."""

from __future__ import annotations

import os
import re
import statistics
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runs.soak.world import World

_EVERY_S = 1.0
_FEWEST_STEPS = 150  # of a process's life, for a verdict on it
MARGIN = 0.05
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Life:
    """Of one process: (step of the run, resident MiB) each second."""

    kind: str
    samples: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    @property
    def steps(self) -> int:
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0

    @property
    def growth(self) -> float | None:
        """Of the last fifth over the second fifth, the first being warm-up; None for a life that is too short."""
        if self.steps < _FEWEST_STEPS:
            return None
        return self._median(0.8, 1.0) / self._median(0.2, 0.4) - 1

    def _median(self, start: float, end: float) -> float:
        first = self.samples[0][0]
        inside = [mib for step, mib in self.samples if start * self.steps <= step - first <= end * self.steps]
        return statistics.median(inside or [self.samples[-1][1]])

    def curve(self, points: int = 20) -> list[tuple[int, float]]:
        every = max(1, len(self.samples) // points)
        return [(step, round(mib, 1)) for step, mib in self.samples[::every]]


class Watch:
    """Samples all processes of a world in a thread of its own, until it is closed."""

    def __init__(self, world: World) -> None:
        self.lives: dict[int, Life] = {}
        self.shared: set[str] = set()  # files of /dev/shm that one of them has used
        self._world, self._end = world, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(_EVERY_S):
            step = self._world.steps_logged()
            for process in list(self._world.running.values()):
                self.shared |= shared_memory(process.pid)
                mib = resident_mib(process.pid) if process.popen.poll() is None else 0.0
                if mib and step:
                    self.lives.setdefault(process.pid, Life(process.kind)).samples.append((step, mib))


def shared_memory(pid: int) -> set[str]:
    """Files of /dev/shm in a process's memory."""
    with suppress(OSError):
        return set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
    return set()


def resident_mib(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB
    except (OSError, IndexError):
        return 0.0
