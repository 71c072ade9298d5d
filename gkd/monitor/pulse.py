"""A sign of life where the output is a file: a line a minute, when there was none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gkd.monitor.text import format_duration

_EVERY_S = 60.0
_LONGEST_TASK = 80  # characters


class Pulse:
    """Says what goes on, and for how long, when nothing else was said for `every_s`; from a thread of its own."""

    def __init__(self, say: Callable[[str], None], *, every_s: float = _EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._task, self._since = "starting", time.monotonic()
        self._last_line = self._since
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """`stop` must follow."""
        self._thread = threading.Thread(target=self._beat, name="gkd-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing is said after it; may be called twice, and without a start."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def task(self, name: str) -> None:
        """What goes on from now on."""
        line = name.partition(";")[0].strip().partition("\n")[0]
        self._task, self._since = line[:_LONGEST_TASK], time.monotonic()

    def heard(self) -> None:
        """A line was written."""
        self._last_line = time.monotonic()

    def _beat(self) -> None:
        while not self._stopped.wait(max(0.0, self._last_line + self._every_s - time.monotonic())):
            if time.monotonic() - self._last_line >= self._every_s:
                self._say(f"  {self._task}: {format_duration(time.monotonic() - self._since)} so far")
                self.heard()
