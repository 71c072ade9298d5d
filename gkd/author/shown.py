"""Rows to look at: a sample of what was written, of a size that does not grow."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from gkd.seeding import derive_uniform

_SHOWN = 40


class ShownRows:
    """Each row that was added is as likely to be among them as any other."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = seed, 0
        self._heap: list[tuple[float, int, str, Mapping[str, Any]]] = []  # the largest draw is on top, negated

    def add(self, origin: str, row: Mapping[str, Any]) -> None:
        entry = (-derive_uniform(self._seed, "shown", self._count), self._count, origin, row)
        self._count += 1
        if len(self._heap) < _SHOWN:
            heapq.heappush(self._heap, entry)
        elif entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def rows(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """(origin, row), in the order in which they were written."""
        return [(origin, row) for _, _, origin, row in sorted(self._heap, key=lambda entry: entry[1])]
