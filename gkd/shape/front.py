"""Which of the measured candidates are worth a look: those that none is both smaller and closer than."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]  # a candidate of a record


def divergence(row: Row) -> float | None:
    """The last that was measured, in nats a token; None where none was."""
    found = row.get("after_probe", row.get("after_cut"))
    return None if found is None or not math.isfinite(found) else found


def nats(row: Row) -> float:
    """`divergence` of a row that was measured."""
    found = divergence(row)
    assert found is not None
    return found


def pareto(rows: Sequence[Row]) -> list[Row]:
    """By parameters and divergence; smallest first."""
    front: list[Row] = []
    measured = [row for row in rows if divergence(row) is not None]
    for row in sorted(measured, key=lambda row: (row["parameters"], nats(row))):
        if not front or nats(row) < nats(front[-1]):
            front.append(row)
    return front


def knee(front: Sequence[Row]) -> Row | None:
    """Where the front bends most: what is farthest below the line between its ends, by the logarithm of parameters and
    by divergence, each as a share of the front's range (Satopää et al. 2011, Finding a "Kneedle" in a Haystack).

    The closest where it bends nowhere inwards; None of none.
    """
    if not front:
        return None
    first, last = front[0], front[-1]
    size = math.log(last["parameters"] / first["parameters"]) or 1.0
    fall = nats(first) - nats(last) or 1.0

    def below(row: Row) -> float:
        along = math.log(row["parameters"] / first["parameters"]) / size
        fallen = (nats(first) - nats(row)) / fall
        return fallen - along

    bend = max(front, key=below)
    return bend if below(bend) > 0.0 else last
