"""What a terminal, or a log, is told while rows are made."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from gkd.author.authors.kept import Spent
from gkd.author.records import Tally
from gkd.errors import one_line
from gkd.monitor.text import format_duration, format_rate

_EVERY_S, _EVERY_S_IN_A_LOG = 0.5, 30.0
_MOST_REASONS = 3


class Progress:
    """One line, over and over on a terminal, now and then elsewhere."""

    def __init__(self, rows: int, stream: TextIO | None = None) -> None:
        self._rows, self._stream = rows, stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._last = time.monotonic()
        self._begun: tuple[float, int] | None = None  # when the first answer came that was not kept, and of which row

    def tell(self, tally: Tally, spent: Spent, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if self._begun is None and spent.asked:
            self._begun = now, tally.rows
        if not is_last and now - self._last < (_EVERY_S if self._is_terminal else _EVERY_S_IN_A_LOG):
            return
        self._last = now
        seconds, first = (0.0, 0) if self._begun is None else (now - self._begun[0], self._begun[1])
        line = self.line(tally, spent, seconds / max(1, tally.rows - first))
        begin, end = ("\r\x1b[2K", "\n" if is_last else "") if self._is_terminal else ("", "\n")
        self._stream.write(f"{begin}{line}{end}")
        self._stream.flush()

    def line(self, tally: Tally, spent: Spent, seconds_a_row: float) -> str:
        """rows, written, asked, dropped by reason, tokens, cost, how long yet."""
        parts = [f"{tally.rows}/{self._rows} rows", f"{tally.written} written", f"{spent.asked} asked"]
        if spent.found:
            parts.append(f"{spent.found} kept from before")
        reasons = sorted(tally.dropped.items(), key=lambda item: -item[1])
        if reasons:
            named = [f"{one_line(reason)} {count}" for (_, reason), count in reasons[:_MOST_REASONS]]
            parts.append(f"{sum(tally.dropped.values())} dropped ({', '.join(named)}{', ...' * (len(reasons) > 3)})")
        parts.append(f"{format_rate(spent.prompt_tokens + spent.completion_tokens)} tokens")
        if spent.money:
            parts.append(f"cost {spent.money:.4g}")
        if seconds_a_row and tally.rows < self._rows:
            parts.append(f"{format_duration(seconds_a_row * (self._rows - tally.rows))} left")
        return ", ".join(parts)
