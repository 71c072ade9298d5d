"""Whether a server reads texts in their order: it is asked for two that begin alike, and then differ.

Of what they share it has to say the same twice, and of the first token that differs something else. Answers that are
shifted by a place, mixed up, or the same for everything fail one of the two. Later it has to say the same again, and so
has every other server of that teacher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from gkd.seeding import derive_seed

SHARED_TOKENS = 4
_LEAST_DIFFERENCE = 0.02
_OF_DIFFERENCE = 0.5  # at most so much of what another token makes may be rounding
Rows = TypeVar("Rows")


def probe_texts(vocabulary_rows: int) -> tuple[list[int], list[int]]:
    """Two texts of any tokens: `SHARED_TOKENS` that they share, one that they do not, and one that they share again."""
    drawn = [derive_seed(0, "teacher probe", place) % vocabulary_rows for place in range(SHARED_TOKENS + 2)]
    others = list(drawn)
    others[SHARED_TOKENS] = (drawn[SHARED_TOKENS] + vocabulary_rows // 2) % vocabulary_rows
    return drawn, others


class Probe(Generic[Rows]):
    """What was said of the two texts at first. `distances` of two answers, row by row: 0 if they are the same."""

    def __init__(self, distances: Callable[[Rows, Rows], Sequence[float]]) -> None:
        self._distances = distances
        self._known: tuple[Rows, Rows] | None = None
        self._limit = 0.0
        self._lock = threading.Lock()  # servers are probed at the same time

    def check(self, one: Rows, other: Rows, shared_rows: int) -> None:
        """`shared_rows` of the answers are of what the texts share. Raises ValueError for answers that are wrong."""
        with self._lock:
            if self._known is None:
                self._limit = _check_order(self._distances(one, other), shared_rows)
                self._known = one, other
        for known, found in zip(self._known, (one, other), strict=True):
            drift = max(self._distances(known, found))
            if not drift <= self._limit:
                raise ValueError(
                    f"it scores a text otherwise than that was scored at first ({drift:.2g} apart, where rounding may "
                    f"make {self._limit:.2g})"
                )


def _check_order(apart: Sequence[float], shared_rows: int) -> float:
    """How far rounding may take answers to the same text apart."""
    rounding, difference = max(apart[:shared_rows]), apart[shared_rows]
    if not difference > _LEAST_DIFFERENCE:
        raise ValueError("it says the same after one token as after another: are its answers shifted, or empty?")
    if not rounding < _OF_DIFFERENCE * difference:
        raise ValueError(
            f"it scores the same tokens {rounding:.2g} apart in two texts, and other tokens {difference:.2g}: are "
            "its answers shifted?"
        )
    return _OF_DIFFERENCE * difference
