"""A step packed against padded."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, percent, section, three_digits


def packing_section(results: Path) -> str:
    """A step's forward and backward both ways, one table a record."""
    parts = []
    for record in records(results, "packing").values():
        lines = [
            [name, three_digits(way["seconds_p50"]), f"{way['tokens_per_s']}", f"{way['micro_batches']}",
             f"{way['positions_computed']}", percent(way["padding"])]
            for name, way in record["ways"].items()
        ]  # fmt: skip
        parts += [
            f"{record['device']}, {record['versions']}; {record['batch']} rollouts, {record['tokens']} tokens in all, "
            f"padded {record['micro_batch_size']} a forward, packed {record['micro_batch_tokens']} tokens a forward.",
            markdown(["", "s", "tokens/s", "forwards", "positions computed", "padding"], lines),
            f"Packed is {record['speedup']} times as fast; in float32 the gradients differ by "
            f"{record['gradient_difference_float32']:.1e} of their norm.",
        ]
    return section(parts)
