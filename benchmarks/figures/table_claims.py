"""The figures of the comparison of ways to distil that docs/table.md and configs/methods state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.figures.judging import Again, Claim, Figure
from gkd.bench import additions
from gkd.bench.differences import difference_of
from gkd.bench.methods import ON_POLICY, Method
from gkd.bench.summary import gain_ratio
from gkd.bench.tables import BASELINE, GREEDY, SAMPLED

TABLE = ("docs/table.md",)
GKD_TABLE, GKD_ADDITIONS = "gkd_table_cpu.json", "gkd_additions_cpu.json"


def gain_over_supervised(choose: Callable[[Iterable[float]], float], accuracy: Callable[..., float]) -> Figure:
    """The least or the greatest ratio of gains of the divergences on policy."""

    def figure(path: Path) -> float:
        cells = json.loads(path.read_text())["cells"]
        found = (gain_ratio(cells, method.label, BASELINE, accuracy) for method in ON_POLICY)
        return choose(one.value for one in found if one is not None)

    return Figure(GKD_TABLE, figure)


def brought(method: Method, accuracy: Callable[..., float]) -> Figure:
    """Points of accuracy that an addition brings to what it stands beside."""

    def figure(path: Path) -> float:
        found = difference_of(json.loads(path.read_text())["cells"], method.label, method.beside, accuracy)
        if found is None:
            raise KeyError(method.label)
        return 100.0 * found.mean

    return Figure(GKD_ADDITIONS, figure)


def failed_cells(path: Path) -> float:
    """Of a comparison of ways to distil, whatever its size."""
    part, _ = path.stem.rsplit("_", 1)
    found = [json.loads(one.read_text()) for one in path.parent.glob(f"{part}_*.json")]
    if not found:
        raise FileNotFoundError(path)
    return float(sum("failed" in cell for record in found for cell in record["cells"]))


TABLE_CLAIMS = [
    *(
        Claim(
            f"ways to distil: {name} ratio of gains, {accuracy}",
            rf"In {accuracy} accuracy on-policy GKD\s+gains {says} times",
            gain_over_supervised(choose, figure),
            pages=TABLE,
        )
        for accuracy, figure in (("greedy", GREEDY), ("sampled", SAMPLED))
        for name, choose, says in (
            ("least", min, r"(-?[\d.]+) to -?[\d.]+"),
            ("greatest", max, r"-?[\d.]+ to (-?[\d.]+)"),
        )
    ),
    Claim(
        "ways to distil: failed cells",
        r"of which (\d+) failed",
        Figure(GKD_TABLE, failed_cells),
        Again("gkd_table", 1.0, 1.0, "none may fail"),
        TABLE,
    ),
    Claim(
        "ways to distil: failed cells of additions",
        r"the assistant .*of which (\d+) failed",
        Figure(GKD_ADDITIONS, failed_cells),
        Again("gkd_additions", 1.0, 1.0, "none may fail"),
        TABLE,
    ),
    *(
        Claim(
            f"ways to distil: {config}, {name}",
            rf"(-?[\d.]+) ± [\d.]+ (?:points )?of\s(?:# )?{name}",
            brought(method, figure),
            pages=(f"configs/methods/{config}.yaml",),
        )
        for config, method, name, figure in (
            ("hidden_states", additions.FEATURES, "greedy", GREEDY),
            ("relations", additions.RELATIONS, "greedy", GREEDY),
            ("minillm", additions.MINILLM, "greedy", GREEDY),
            ("minillm", additions.MINILLM, "sampled", SAMPLED),
            ("minillm_mixed", additions.MINILLM_MIXED, "greedy", GREEDY),
            ("rkd", additions.RKD, "greedy", GREEDY),
            ("replay", additions.REPLAY, "greedy", GREEDY),
            ("speculative", additions.SPECULATIVE, "sampled", SAMPLED),
            ("dynamic_weights", additions.DYNAMIC_WEIGHTS, "greedy", GREEDY),
            ("soft_then_hard", additions.soft_then_hard(0), "sampled", SAMPLED),
            ("adaptive", additions.ADAPTIVE, "greedy", GREEDY),
        )
    ),
]
