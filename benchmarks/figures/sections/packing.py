"""A step padded, packed, and with compiled layers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, percent, section, three_digits


def packing_section(results: Path) -> str:
    """A step's forward and backward each way, one table a record."""
    parts = []
    for record in records(results, "packing").values():
        lines = [
            [name, three_digits(way["seconds_p50"]), f"{way['tokens_per_s']}", f"{way['micro_batches']}",
             f"{way['positions_computed']}", percent(way["padding"]), f"{way['speedup']:.2f}",
             f"{way['gradient_difference_float32']:.1e}"]
            for name, way in record["ways"].items()
        ]  # fmt: skip
        parts += [
            f"{record['device']}, {record['versions']}; {record['batch']} rollouts, {record['tokens']} tokens in all, "
            f"padded {record['micro_batch_size']} a forward, packed {record['micro_batch_tokens']} tokens a forward.",
            markdown(
                ["", "s", "tokens/s", "forwards", "positions computed", "padding", "× padded", "gradients differ by"],
                lines,
            ),
            f"Packed is {record['ways']['packed']['speedup']:.2f} times as fast as padded, compiled layers "
            f"{record['ways']['compiled']['speedup']:.2f} times, after {record['compile_s']:.0f} s of compiling. "
            "Gradients are compared in float32, relative to their norm.",
        ]
    return section(parts)
