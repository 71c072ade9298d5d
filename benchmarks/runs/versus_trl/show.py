"""The record as it is printed at the end."""

from __future__ import annotations

from typing import Any

from benchmarks.records import say
from benchmarks.runs.versus_trl import same_seconds
from gkd.bench.rows import columns


def show(record: dict[str, Any]) -> None:
    rows = [["", "s a step", "sampling", "scoring", "training", "sync", "tokens/s", "peak GiB", "held-out JSD"]]
    for name, contender in record["contenders"].items():
        found = {key: value["median"] for key, value in contender["over_rounds"].items()}
        parts = [f"{found[f'{part}_s']:.2f}" for part in ("step", "sampling", "scoring", "training", "sync")]
        memory = f"{found['peak_rss_bytes'] / 2**30:.2f}"
        rows.append([name, *parts, f"{found['tokens_per_s']:.0f}", memory, f"{found['heldout/jsd']:.4f}"])
    say("")
    columns(rows)
    if "same_seconds" in record:
        say("")
        columns(same_seconds.rows(record["same_seconds"]))
    bound = record["bound"]
    say(f"\ngkd is {record['speedup_vs_fastest_trl']:.2f} times as fast a step as {record['fastest_trl']}")
    say(
        f"its training half needs {bound['training_flops_a_step'] / 1e12:.2f} TFLOP, {bound['least_training_s']:.2f} s "
        f"at this machine's best product: it reaches {100 * bound['share_reached']:.0f} % of that\n"
    )
    columns(profile_rows(record["profile"]["phases"]))


def profile_rows(phases: dict[str, dict[str, float]]) -> list[list[str]]:
    """Self seconds of kinds of work by phase, the most first; without phases that round to nothing."""
    phases = {phase: found for phase, found in phases.items() if sum(found.values()) >= 0.005}
    total: dict[str, float] = {}
    for found in phases.values():
        for group, seconds in found.items():
            total[group] = total.get(group, 0.0) + seconds
    rows = [["profiled step, s", *phases, "all"]]
    for group in sorted(total, key=lambda group: -total[group]):
        rows.append([group, *(f"{found.get(group, 0.0):.2f}" for found in phases.values()), f"{total[group]:.2f}"])
    return rows
