"""Whose student is closer to the teacher after equally many seconds of training.

The seconds are those that gkd takes for a number of steps, by the step that the rounds have measured; every contender
trains for as many of its own steps as they hold, at least one, with the settings of the rounds. So the runs themselves
need no quiet machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.records import say
from benchmarks.runs.versus_trl import tuning
from benchmarks.runs.versus_trl.bench import Benchmark
from benchmarks.runs.versus_trl.tuning import Settings


def same_seconds(benchmark: Benchmark, contenders: Mapping[str, Any], steps: int, seeds: int) -> dict[str, Any]:
    """`steps` are gkd's. Of each contender its steps, and the held-out divergences of its students by seed."""
    step_s = {name: found["over_rounds"]["step_s"]["median"] for name, found in contenders.items()}
    seconds = steps * step_s["gkd"]
    counts = {name: max(1, int(seconds / one + 1e-9)) for name, one in step_s.items()}
    say(f"for the same {seconds:.0f} s: {', '.join(f'{name} {count} steps' for name, count in counts.items())}")
    folder = benchmark.folder / "same_seconds"
    work = replace(benchmark.work, steps=max(counts.values()), folder=str(folder))  # prompts for whoever makes most
    longer = replace(benchmark, work=work, folder=folder)
    longer.run("prepare", "prepare", smoke=benchmark.smoke)
    heldout: dict[str, list[dict[str, float]]] = {name: [] for name in counts}
    for seed in range(seeds):
        settings = {name: found["settings"] for name, found in contenders.items()}
        for name, found in _one_seed(longer, settings, counts, seed).items():
            heldout[name].append(found)
    return {
        "seconds": seconds,
        "contenders": {name: {"steps": counts[name], "heldout": found} for name, found in heldout.items()},
    }


def _one_seed(
    benchmark: Benchmark, settings: Mapping[str, Settings], counts: Mapping[str, int], seed: int
) -> dict[str, dict[str, float]]:
    students = {
        name: tuning.trained(benchmark, name, f"seed_{seed}", chosen, seed=seed, steps=counts[name])["student"]
        for name, chosen in settings.items()
    }
    found = benchmark.run("evaluate", f"seed_{seed}_heldout", students=list(students.values()))
    return {name: found[student] for name, student in students.items()}


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Means over seeds, with the lowest and the highest; first the header."""
    made = [[f"after {found['seconds']:.0f} s of training", "steps", "held-out JSD", "held-out KL"]]
    for name, contender in found["contenders"].items():
        values = [[one[f"heldout/{kind}"] for one in contender["heldout"]] for kind in ("jsd", "forward_kl")]
        cells = [
            f"{statistics.fmean(one):.{digits}f} ({min(one):.{digits}f} – {max(one):.{digits}f})"
            for one, digits in zip(values, (4, 3), strict=True)
        ]
        made.append([name, str(contender["steps"]), *cells])
    return made
