"""What several terms of an objective cost, and what a change left as it was."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, section


def terms_section(results: Path) -> str:
    """One table a shape: time, the ratio to one term, products with a head."""
    parts = []
    for record in records(results, "terms").values():
        for case in record["cases"]:
            lines = [
                [name, f"{row['ms']:.0f}", f"{row['ratio']:.2f} × {row['compared_with']}", f"{row['products']:g}"]
                for name, row in case["objectives"].items()
            ]
            parts += [
                f"{record['device']}, {record['threads']} threads; {case['rows']} tokens, {case['hidden']} → "
                f"{case['vocabulary']} in bfloat16; median of {record['rounds']} rounds.  \n{record['versions']}.",
                markdown(["objective", "ms", "ratio", "products a token"], lines),
            ]
    return section(parts)


def before_and_after_section(results: Path) -> str:
    parts = []
    for record in records(results, "before_and_after").values():
        equal = "are equal bit by bit" if record["all_equal"] else "are NOT equal"
        kinds = sorted({name.split()[0] for name in record["compared"]})
        text = (
            f"{record['device']}: against commit {record['before'][:7]}, losses and weights of {record['steps']} steps "
            f"{equal}, in float32 and bfloat16, for {', '.join(kinds)}."
        )
        if record["speed"]:
            speed = record["speed"]
            text += (
                f" Forward, backward and optimizer take {speed['ratio']:.3f} of the time before, at most "
                f"{speed['upper_95']:.3f} (upper end of the 95 % interval of the median of {speed['pairs']} pairs)."
            )
        parts.append(text)
    return section(parts)
