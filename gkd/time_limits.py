"""Limits to the processor time of what others wrote: programs in templates, and texts that a regex is slow with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class TooLongError(Exception):
    pass


@contextmanager
def processor_time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLongError in the block after so much processor time; a busy machine takes nothing from it.

    Signals reach the main thread alone: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise TooLongError
