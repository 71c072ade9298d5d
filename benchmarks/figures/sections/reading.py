"""Results from their files, and how a case is called."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BOTH = "value+gradient"
Row = dict[str, str]
Record = dict[str, Any]


def records(results: Path, kind: str) -> dict[str, Record]:
    """Each JSON of a kind of result, by the file's name without its ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob(f"{kind}*.json"))}


def read(results: Path, op: str) -> dict[str, list[Row]]:
    """The rows of each CSV of an op, by the file's name without its ending."""
    found = {}
    for path in sorted(results.glob(f"{op}*.csv")):
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def grouped(rows: Iterable[Row], *columns: str) -> list[list[Row]]:
    """Rows with equal values in these columns, in the order in which they come first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(groups.values())


def shape(row: Row) -> str:
    if "student_hidden" in row:
        return f"{row['rows']} × ({row['student_hidden']}, {row['teacher_hidden']}) → {row['vocab']}"
    return f"{row['rows']} × {row['vocab']}"


def divergence_name(row: Record) -> str:
    """Of a CSV's row, or of what a JSON says of its work."""
    return row["kind"] + (f"({row['beta']})" if row["kind"] == "jsd" else "")


def floor_ms(rows: Sequence[Row]) -> float | None:
    """What a copy of the bytes that must move would take; the same for every implementation of a case."""
    ours = next((row for row in rows if row["implementation"] == "gkd"), None)
    return float(ours["ms_p50"]) * float(ours["copy_share"]) if ours and ours["copy_share"] else None
