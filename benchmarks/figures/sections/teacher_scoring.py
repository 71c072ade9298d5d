"""Ways to score at a served teacher."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import Record, records
from benchmarks.figures.sections.text import markdown, section, three_digits


def teacher_scoring_section(results: Path) -> str:
    """Seconds of a pass and bytes a token of each way, one table a record."""
    parts = []
    for record in records(results, "teacher_scoring").values():
        passes = len(record["methods"]["hidden states"]["seconds"])
        parts += [
            f"{record['model']}, {record['dtype']}, {record['sequences']} sequences of {record['tokens']} tokens; "
            f"medians of {passes} passes on {record['device']} (load {record['load_average']}), {record['vllm']}.",
            teacher_scoring_table(record["methods"]),
        ]
    return section(parts)


def teacher_scoring_table(ways: dict[str, Record]) -> str:
    ours, lines = ways["hidden states"], []
    for name, way in ways.items():
        seconds, size = way["median_s_of_the_work"], way["bytes_a_token"]
        ratios = seconds / ours["median_s_of_the_work"], size / ours["bytes_a_token"]
        label = name + (f" ({way['note']})" if way["note"] else "")
        lines.append([label, three_digits(seconds), f"{size:,.0f}", *(f"{three_digits(ratio)} ×" for ratio in ratios)])
    return markdown(["way", "s a pass", "bytes a token", "time", "bytes"], lines)
