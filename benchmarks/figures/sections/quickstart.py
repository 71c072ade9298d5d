"""What came of the quickstart."""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, percent, section

DIVERGENCES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD"}


def quickstart_section(results: Path) -> str:
    """Held-out divergences before and after."""
    parts = []
    for record in records(results, "quickstart").values():
        summary = record["summary"]
        lines = []
        for name, label in DIVERGENCES.items():
            before, after = (summary[f"heldout_{name}_{when}"] for when in ("before", "after"))
            lines.append([label, f"{before:.3f}", f"{after:.3f}", percent(after / before)])
        packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
        parts += [
            f"`{record['command']}`, {summary['steps']} steps in {summary['wall_s'] / 60:.1f} min on "
            f"{record['device']}; {packages}.",
            markdown(["held-out, nats a token", "before", "after", "left"], lines),
        ]
    return section(parts)
