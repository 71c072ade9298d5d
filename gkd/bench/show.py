"""A record for the terminal, and as CSV: a row a cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from gkd.bench.parts import Part
from gkd.bench.rows import columns
from gkd.bench.summary import CellResult


def show(record: dict[str, Any], part: Part) -> None:
    for rows in part.tables(record):
        print()
        columns(rows)
    print(f"\n{part.verdict(record)}\n")


def write_csv(path: Path, record: dict[str, Any]) -> None:
    """A failed cell has its reason and no figures."""
    rows = [flat(cell) for cell in record["cells"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def flat(cell: CellResult) -> dict[str, Any]:
    """Scores by task get a column each, `greedy/addition`; curve and assistant stay in the JSON."""
    method = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in cell["method"].items()}
    row = {"setting": cell["setting"], "seed": cell["seed"], **method, "failed": cell.get("failed", "")}
    row |= {name: cell[name] for name in ("trained_tokens", "sampled_tokens", "steps") if name in cell}
    row |= {f"{name}_s": f"{seconds:.2f}" for name, seconds in cell.get("seconds", {}).items()}
    for name, value in cell.get("scores", {}).items():
        by_task = (
            {f"{name}/{task}": share for task, share in value.items()} if isinstance(value, dict) else {name: value}
        )
        row |= {column: "" if found is None else f"{found:.5f}" for column, found in by_task.items()}
    return row
