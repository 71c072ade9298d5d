"""Stopping early without losing a step: after a signal, or when a part has failed for good."""

from __future__ import annotations

from gkd.errors import PartError
from gkd.train.distributed import max_over_ranks
from gkd.train.signals import Signals


class Interruption:
    """What stops a run after a step: one rank that has seen a signal stops all, after the same step."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self.error: PartError | None = None  # of a part, on all ranks: the run cannot go on

    def is_requested(self) -> bool:
        """Collective."""
        requested = max_over_ranks(float(self._signals.is_seen or self.error is not None)) > 0
        if requested:
            self._signals.answered()
        return requested

    def because_of(self, error: PartError) -> None:
        """To be called on all ranks."""
        self.error = error
