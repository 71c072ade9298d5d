"""Sampling ahead against strictly on-policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures.sections.reading import records
from benchmarks.figures.sections.text import markdown, percent, section, three_digits


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
            verdict(arms),
        ]
    return section(parts)


def verdict(arms: Mapping[str, Mapping[str, Any]]) -> str:
    halves, whole = speedup(arms, "half of the cores each"), speedup(arms, "all cores for both")
    return (
        f"Sampling ahead takes {halves:.2f} times fewer seconds a step than taking turns with the same cores for each, "
        f"and {whole:.2f} times fewer than taking turns with all."
    )


def speedup(arms: Mapping[str, Mapping[str, Any]], on_policy: str) -> float:
    """Of staleness 1 over staleness 0 with these cores."""
    ahead_s = arms["staleness 1, half of the cores each"]["median_step_s"]
    return arms[f"staleness 0, {on_policy}"]["median_step_s"] / ahead_s
