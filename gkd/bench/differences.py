"""What an addition brings: its figures less those of the method that it stands beside, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gkd.bench.rows import Rows, difference
from gkd.bench.summary import CellResult, Estimate, Figure, estimate, gains, labels, score
from gkd.bench.tables import GREEDY, SAMPLED, shown

ACCURACIES: Mapping[str, Figure] = {"greedy": GREEDY, "sampled": SAMPLED}
_NATS = {"KL(teacher ‖ student)": score("forward_kl"), "KL(student ‖ teacher)": score("reverse_kl")}


def addition_rows(record: dict[str, Any]) -> Rows:
    """Differences of means over seeds, with the half-widths of their 95 % t-intervals."""
    cells = record["cells"]
    rows = [["", "beside", *(f"{name}, points" for name in ACCURACIES), *_NATS, "seeds"]]
    for label, beside in additions_beside(cells).items():
        points = [difference_of(cells, label, beside, figure) for figure in ACCURACIES.values()]
        nats = [difference_of(cells, label, beside, figure) for figure in _NATS.values()]
        seeds = "–" if points[0] is None else str(points[0].seeds)
        told = [*(difference(one, 100.0, 1) for one in points), *(difference(one) for one in nats)]
        rows.append([label, shown(beside), *told, seeds])
    return rows


def additions_verdict(record: dict[str, Any]) -> str:
    """Which additions are told from nothing, in either accuracy."""
    return "  \n".join(_sentence(record["cells"], name, figure) for name, figure in ACCURACIES.items())


def additions_beside(cells: Sequence[CellResult]) -> dict[str, str]:
    """Each addition with what it stands beside."""
    beside = {cell["method"]["label"]: cell["method"]["beside"] for cell in cells}
    return {label: beside[label] for label in labels(cells, "addition")}


def difference_of(cells: Sequence[CellResult], label: str, beside: str, figure: Figure) -> Estimate | None:
    """Over the seeds that both have; None without."""
    found = gains(cells, label, figure, over=beside)
    return estimate(list(found.values())) if found else None


def _sentence(cells: Sequence[CellResult], name: str, figure: Figure) -> str:
    found = {label: difference_of(cells, label, beside, figure) for label, beside in additions_beside(cells).items()}
    known = {label: one for label, one in found.items() if one is not None and one.half_width is not None}
    more = [label for label, one in known.items() if one.mean > (one.half_width or 0.0)]
    less = [label for label, one in known.items() if one.mean < -(one.half_width or 0.0)]
    return (
        f"In {name} accuracy, beside the method without it and at 95 %, more: {'; '.join(more) or 'none'}. "
        f"Less: {'; '.join(less) or 'none'}. Undecided: {len(known) - len(more) - len(less)} of {len(known)}."
    )
