"""How long something that failed is tried again."""

from __future__ import annotations

import math
import time

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0


class Patience:
    """Pauses between attempts, each twice as long as the one before, until `limit_s` after the first failure."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._end = math.inf  # of time.monotonic
        self._pause_s = _FIRST_PAUSE_S

    def start(self) -> None:
        """Something failed: the first time, the clock starts."""
        self._end = min(self._end, time.monotonic() + self._limit_s)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def next_pause_s(self) -> float | None:
        """How long to wait before the next attempt; None if the time is over. The last attempt comes when it is."""
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            return None
        pause_s = min(self._pause_s, left_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s

    def pause(self) -> bool:
        """Waits, and returns True; False, at once, if the time is over."""
        pause_s = self.next_pause_s()
        if pause_s is None:
            return False
        time.sleep(pause_s)
        return True
