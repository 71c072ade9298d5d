"""How fast a server may be asked, as its headers say it: Retry-After, and the rate limits of OpenAI's API."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_LOOK_UP_S = 1.0
_LONGEST_S = 3600.0  # nobody waits longer because of a header
_PARTS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LIMITED = ("requests", "tokens")


class Pace:
    """The time from which on a server may be asked again; all of its requests wait for it."""

    def __init__(self) -> None:
        self._ready_at = 0.0  # of time.monotonic

    async def wait(self, may_ask: Callable[[], None] = lambda: None) -> None:
        """Raises what `may_ask` does, which is called every second: nobody waits for an hour to be stopped."""
        may_ask()
        while (left_s := self._ready_at - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_UP_S))
            may_ask()

    def note(self, headers: Mapping[str, str], *, is_refused: bool) -> None:
        """Of an answer; `is_refused`: it came too soon (429), or the server is busy (503)."""
        wait_s = _retry_after_s(headers.get("retry-after")) if is_refused else 0.0
        for what in _LIMITED:
            if headers.get(f"x-ratelimit-remaining-{what}") == "0" or (is_refused and not wait_s):
                wait_s = max(wait_s, duration_s(headers.get(f"x-ratelimit-reset-{what}")))
        if wait_s:
            self._ready_at = max(self._ready_at, time.monotonic() + min(wait_s, _LONGEST_S))


def duration_s(text: str | None) -> float:
    """`6m0s`, `20ms`, `1.5`: in seconds; 0 of what is none."""
    if text is None:
        return 0.0
    try:
        return max(0.0, float(text))
    except ValueError:
        return sum(float(number) * _UNITS_S[unit] for number, unit in _PARTS.findall(text))


def _retry_after_s(text: str | None) -> float:
    """Seconds, or a date."""
    if text is None or text[:1].isdigit():
        return duration_s(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0
