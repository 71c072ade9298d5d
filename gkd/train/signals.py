"""What a run does on SIGUSR1 and SIGTERM. No torch here: a run that starts heeds them too.

SIGUSR1 is a scheduler's word some time before it takes the machine (Slurm: --signal=USR1@300), SIGTERM the last one. In
training both mean: finish the step, save, end with 75. But launchers send SIGTERM to ranks whose partner has died as
well, and those would wait for it in vain: a process that hears in time nothing from the others ends.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from gkd.errors import RunInterruptedError

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM  # the shell's exit code of a process that SIGTERM ended


class Signals:
    """Heeds both inside its block. `is_seen`: one came.

    Outside of `deferred` they raise in the main thread, so that whatever is under way is cleaned up: SIGUSR1
    RunInterruptedError, SIGTERM SystemExit. Where that thread does not return to Python, as it waits for another rank,
    a second one ends the process `grace_s` after SIGTERM, unless `answered` was called; `on_end` is told before.
    """

    def __init__(self, grace_s: float, on_end: Callable[[int, str], None] = lambda status, reason: None) -> None:
        self.is_seen = False
        self._grace_s, self._on_end = grace_s, on_end
        self._is_deferred = False
        self._answered = threading.Event()

    def answered(self) -> None:
        """All ranks are there, and have agreed on what to do."""
        self._answered.set()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only remembered: whoever runs the block looks at `is_seen` after each step."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # nobody else may set handlers
            yield
            return
        # Python tells its main thread of a signal only when that returns from C; the descriptor is written to at once
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {number: signal.signal(number, self._see) for number in _SIGNALS}
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._answered.set()
            writer.close()

    def end_process(self, status: int, reason: str) -> NoReturn:
        """From whatever thread, and whatever the main thread waits for: nobody will be told by an exception."""
        _log.error("%s; this rank ends", reason)
        self._on_end(status, reason)
        os._exit(status)

    def _see(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.is_seen = True
        name = signal.Signals(number).name
        if self._is_deferred:
            _log.warning("%s: the run stops after this step", name)
        elif number == signal.SIGUSR1:
            raise RunInterruptedError(f"{name}, and no step is being trained; what was saved goes on with --resume")
        else:
            raise SystemExit(TERMINATED)

    def _watch(self, reader: socket.socket) -> None:
        with reader, suppress(OSError):
            while numbers := reader.recv(16):
                if signal.SIGTERM in numbers and not self._answered.wait(self._grace_s):
                    self.end_process(TERMINATED, f"SIGTERM: not all ranks have answered for {self._grace_s:g} s")
