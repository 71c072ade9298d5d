"""Sampling ahead against strictly on-policy."""

from __future__ import annotations

from pathlib import Path

from .reading import records
from .text import markdown, percent, section, three_digits


def overlap_section(results: Path) -> str:
    """Where the time of a step goes, and how far sampler and trainer differ, one table a record."""
    parts = []
    for record in records(results, "overlap").values():
        arms = record["arms"]
        steps = next(iter(arms.values()))["steps"]
        lines = [
            [name, *(three_digits(arm[f"median_{phase}_s"]) for phase in ("step", "sample", "score")),
             three_digits(arm["median_forward_backward_s"] + arm["median_optimizer_s"]),
             three_digits(arm["median_sync_s"]), f"{arm['median_k3']:.1e}",
             percent(arm["median_effective_sample_share"])]
            for name, arm in arms.items()
        ]  # fmt: skip
        parts += [
            f"`{record['config']}` with {', '.join(f'`{one}`' for one in record['overrides'])}; medians of {steps} "
            f"steps on {record['device']} (load {record['load_average']}), {record['versions']}.",
            markdown(["", "s a step", "wait for samples", "score", "train", "sync", "k3", "effective samples"], lines),
        ]
    return section(parts)
