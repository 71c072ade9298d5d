"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES: tuple[str, ...] = ("sample", "score", "forward_backward", "optimizer", "sync")


class PhaseTimer:
    """Splits the wall time of each step among `PHASES`; what is in none of them is "other".

    A moment counts for one phase only, the innermost that is open. A phase may be entered many times in a step.
    `clock` returns seconds. `synchronize`, if given, is called where a phase begins or ends: it waits for a device
    that works in the background, so that its time counts where it was asked for. One thread only.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, synchronize: Callable[[], None] | None = None
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._open: list[str] = []
        self._totals = _record({}, 0.0)
        self.start()

    def start(self) -> None:
        """The step begins now; what was timed since the last `finish_step` is forgotten."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._step_start = self._mark = self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block as `name`. Raises ValueError for a name that is not in PHASES."""
        _check(name)
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def finish_step(self) -> dict[str, float]:
        """Ends the step and starts the next: `time/<phase>_s` of all phases, and of train, other and step.

        `time/other_s` is never negative.
        """
        self._settle()
        record = _record(self._seconds, self._mark - self._step_start)
        for key, seconds in record.items():
            self._totals[key] += seconds
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._step_start = self._mark
        return record

    @property
    def totals(self) -> dict[str, float]:
        """The sums of all finished steps, under the same keys."""
        return dict(self._totals)

    def _settle(self) -> None:
        """Gives the time since the last mark to the innermost open phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def _record(seconds: dict[str, float], step_wall: float) -> dict[str, float]:
    record = {f"time/{name}_s": seconds.get(name, 0.0) for name in PHASES}
    record["time/train_s"] = record["time/forward_backward_s"] + record["time/optimizer_s"]
    record["time/other_s"] = max(0.0, step_wall - sum(seconds.values()))
    record["time/step_s"] = step_wall
    return record


def _check(name: str) -> None:
    if name not in PHASES:
        raise ValueError(f"no phase {name!r}; known: {', '.join(PHASES)}")
