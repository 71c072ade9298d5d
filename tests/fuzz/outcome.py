"""What an input came to: taken, refused in one line, or a fault of gkd's."""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gkd.errors import GkdError

_LIMIT_S = 3.0
_LONGEST_MESSAGE = 4000


class Refused(Exception):  # noqa: N818  (an outcome)
    """An input was refused by other means than an error of gkd's; `str` is what a user reads."""


@dataclass
class Outcome:
    """Counts of `taken` and `refused`, the longest time, and the faults: what was given, and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def add(self, given: object, call: Callable[[], str | None]) -> None:
        """`call` returns what is wrong with a value that was taken, or None."""
        started = time.process_time()
        signal.signal(signal.SIGVTALRM, _stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, 4 * _LIMIT_S)
        try:
            wrong = call()
            self.counts["taken"] += 1
        except (GkdError, Refused) as error:
            self.counts["refused"] += 1
            text = str(error)
            fine = text.isprintable() and len(text) <= _LONGEST_MESSAGE
            wrong = None if fine else f"message of {len(text)} characters: {text[:200]!r}"
        except (Exception, _HangError):  # noqa: BLE001  what a user would see as a traceback
            wrong = traceback.format_exc(limit=-3)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        elapsed_s = time.process_time() - started
        self.longest_s = max(self.longest_s, elapsed_s)
        if wrong is None and elapsed_s > _LIMIT_S:
            wrong = f"took {elapsed_s:.1f} s"
        if wrong is not None:
            self.counts["faults"] += 1
            self.faults.append(f"{str(given)[:500]!r}\n{wrong}")


class _HangError(BaseException):
    pass


def _stop(_signal: int, _frame: object) -> None:
    raise _HangError
