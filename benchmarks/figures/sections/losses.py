"""The losses against their peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.figures.sections.reading import BOTH, Row, divergence_name, floor_ms, grouped, read, shape
from benchmarks.figures.sections.text import markdown, percent, section, three_digits

LOGIT_BYTES = {"bfloat16": 2, "float32": 4}


def caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    settings = f"T = {three_digits(first['temperature'])}, {percent(first['ignored'])} of the rows ignored"
    measured = f"median of {first['repeats']} rounds"
    threads = "" if first["device"].startswith("NVIDIA") else f", {first['threads']} threads"
    return f"{first['device']}{threads}; {settings}; {measured}.  \n{first['versions']}."


def divergence_section(results: Path) -> str:
    """ms of value and gradient, one line a shape and kind; then what memory and error each implementation has."""
    parts = []
    for rows in read(results, "divergence").values():
        chosen = [row for row in rows if row["work"] == BOTH]
        if chosen:
            parts += [caption(chosen), times_table(chosen), quality_table(chosen)]
    return section(parts)


def times_table(rows: Sequence[Row]) -> str:
    names = [group[0]["implementation"] for group in grouped(rows, "implementation") if any(r["ms_p50"] for r in group)]
    lines = []
    for case in grouped(rows, "rows", "vocab", "dtype", "kind"):
        by_name = {row["implementation"]: row for row in case}
        times = [three_digits(by_name[name]["ms_p50"]) if name in by_name else "–" for name in names]
        share = percent(by_name["gkd"]["copy_share"])
        label = f"{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}"
        lines.append([label, three_digits(floor_ms(case)), *times, share])
    return markdown(["ms", "copy of the bytes", *names, "gkd, of copy rate"], lines)


def quality_table(rows: Sequence[Row]) -> str:
    """The worst over the cases; memory in units of one side's logits, the gradient of their size among it."""
    lines = []
    for group in grouped(rows, "implementation"):
        name, ran = group[0]["implementation"], [row for row in group if row["ms_p50"]]
        memory = [float(row["peak_extra_mb"]) * 1e6 / logits_bytes(row) for row in ran if row["peak_extra_mb"]]
        errors = [[float(row[column]) for row in ran if row[column]] for column in ("value_error", "gradient_error")]
        slower = [float(row["ratio_to_gkd"]) for row in ran]
        worst = [f"{max(numbers):.1e}" if numbers else "–" for numbers in errors]
        spread = f"{three_digits(min(slower))} to {three_digits(max(slower))}" if slower else "–"
        note = "; ".join(
            dict.fromkeys(row["note"] for row in group if row["note"] and "compiled in" not in row["note"])
        )
        lines.append([name, spread, three_digits(max(memory) if memory else None), *worst, note])
    header = ["", "× gkd's time", "extra memory, × logits", "value error", "gradient error", "note"]
    return markdown(header, lines)


def logits_bytes(row: Row) -> int:
    return int(row["rows"]) * int(row["vocab"]) * LOGIT_BYTES[row["dtype"]]


def full_section(op: str, results: Path) -> str:
    """A table for each case, with every implementation, also those that did not run."""
    parts = []
    for rows in read(results, op).values():
        parts.append(caption(rows))
        shape_columns = [name for name in ("rows", "student_hidden", "teacher_hidden", "vocab") if name in rows[0]]
        for case in grouped(rows, *shape_columns, "dtype", "kind", "work"):
            title = f"**{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}, {case[0]['work']}**"
            parts += [title, case_table(case)]
    return section(parts)


def case_table(case: Sequence[Row]) -> str:
    """One line an implementation."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["implementation"],
        "ms": lambda row: three_digits(row["ms_p50"]),
        "p20 – p80": lambda row: f"{three_digits(row['ms_p20'])} – {three_digits(row['ms_p80'])}",
        "× gkd": lambda row: three_digits(row["ratio_to_gkd"]),
    }
    if "ratio_to_gemms" in case[0]:
        columns["× bare products"] = lambda row: three_digits(row["ratio_to_gemms"])
        columns["TFLOP/s"] = lambda row: three_digits(row["tflop_per_s"])
    else:
        columns["GB/s"] = lambda row: three_digits(row["gb_per_s"])
        columns["of copy rate"] = lambda row: percent(row["copy_share"])
    columns |= {
        "extra MB": lambda row: three_digits(row["peak_extra_mb"]),
        "value error": lambda row: row["value_error"] and f"{float(row['value_error']):.1e}",
        "gradient error": lambda row: row["gradient_error"] and f"{float(row['gradient_error']):.1e}",
        "note": lambda row: row["note"],
    }
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in case])
