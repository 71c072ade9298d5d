"""A narrower model, one size at a time: its distance before any training, beside a control."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, percent, section, three_digits


def narrow_section(results: Path) -> str:
    """One table a record, a line a size."""
    parts = []
    for record in records(results, "narrow").values():
        lines = [
            [
                size,
                percent(found["share_of_parameters"]),
                *(three_digits(found[kept]["heldout/forward_kl"]) for kept in ("most_used", "first")),
                three_digits(found["most_used"]["heldout/reverse_kl"]),
                three_digits(found["most_used"]["heldout/jsd"]),
                three_digits(found["seconds"]),
            ]
            for size, found in record["sizes"].items()
        ]
        parts += [
            f"{record['device']} (load {record['load_average']}), {record['versions']}; {record['model']} with all of "
            f"its layers, on {record['calibration_tokens']} calibration tokens in {record['dtype']}. Held-out "
            f"divergences in nats a token, on the teacher's answers to {record['heldout_prompts']} prompts.",
            markdown(["width", "parameters left", "forward KL", "of the first ones", "reverse KL", "JSD", "s"], lines),
        ]
    return section(parts)
