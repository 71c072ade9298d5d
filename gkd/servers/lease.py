"""Whose a served sampler is: it holds the weights of one run, and works for that alone."""

from __future__ import annotations

import time
from http import HTTPStatus

from starlette.exceptions import HTTPException

from gkd.serving.sampler_protocol import LEASE_S, RunIdentity


class Lease:
    """A run takes it, keeps it by asking for anything, and gives it back at its end. Another one may take it over when
    its holder was silent for `LEASE_S`; the same run may at any time, as when it goes on in another process.

    Every refusal is an HTTPException that names the holder.
    """

    def __init__(self) -> None:
        self._holder: RunIdentity | None = None
        self._heard = 0.0  # time.monotonic

    def take(self, run: RunIdentity) -> None:
        """Status 423 if another run has it."""
        if self._silent_s < LEASE_S:
            self._check_holder(run)
        self._holder, self._heard = run, time.monotonic()

    def check(self, run: RunIdentity) -> None:
        """Before anything is done for a run. Status 423 if another one has the lease, 409 if nobody does."""
        if self._holder is None:
            raise HTTPException(HTTPStatus.CONFLICT, "this sampler works for no run now; one takes it by POST /lease")
        self._check_holder(run)
        self._heard = time.monotonic()

    def give_back(self, run: RunIdentity) -> None:
        if self._holder is not None and self._holder.id == run.id:
            self._holder = None

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._heard

    def _check_holder(self, run: RunIdentity) -> None:
        if self._holder is not None and self._holder.id != run.id:
            raise HTTPException(
                HTTPStatus.LOCKED,
                f"this sampler works for another run, {self._holder.name}, which was heard {self._silent_s:.0f} s ago; "
                f"it is free when that run ends, or has been silent for {LEASE_S:g} s",
            )
