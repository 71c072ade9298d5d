"""Stopping early without losing a step: on SIGUSR1 a run finishes its step, saves a checkpoint, and ends with code 75.

Schedulers send the signal some time before they take the machine (Slurm: --signal=USR1@300); `--resume` goes on. Not on
SIGTERM: launchers send that to ranks whose partner has failed, and those must end, not wait for it.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from gkd.errors import PartError
from gkd.train.distributed import max_over_ranks

_log = logging.getLogger(__name__)


class Interruption:
    """Remembers the signal. One rank that has seen it stops all, after the same step."""

    def __init__(self) -> None:
        self._seen = False
        self.error: PartError | None = None  # of a part, on all ranks: the run cannot go on
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            signal.signal(signal.SIGUSR1, self._see)

    def is_requested(self) -> bool:
        """Collective."""
        return max_over_ranks(float(self._seen or self.error is not None)) > 0

    def because_of(self, error: PartError) -> None:
        """To be called on all ranks."""
        self.error = error

    def _see(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._seen = True
        _log.warning("%s: the run stops after this step", signal.Signals(number).name)
