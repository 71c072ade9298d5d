"""A long run under faults: python -m benchmarks.runs.soak [--steps 2000] [--seed 0] [--faults 30] [--out FILE]

A tiny run on served samplers and teachers (transformers in vLLM's place) is done twice, side by side: undisturbed, and
with kills, stops, signals, servers that go and come, and a full disk, drawn from the seed. After each fault the run is
taken up again as the documents tell. At the end losses and weights have to be those of the undisturbed run, bit by bit,
the memory of every process flat, and nothing left behind. The exit status is 1 if something is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import environment
from benchmarks.records import RESULTS, command, rounded, say
from benchmarks.runs.soak import ends
from benchmarks.runs.soak.faults import FAULTS, Fault, disturbed, drawn
from benchmarks.runs.soak.memory import MARGIN, Watch
from benchmarks.runs.soak.world import ABANDONED, World, announce, make_world, small_disk, write_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gkd_soak_") as folder:
        record = soak(Path(folder), steps=options.steps, seed=options.seed, count=options.faults)
    record = {"command": command(), **environment("cpu"), "load_average": rounded(os.getloadavg()[0], 2), **record}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    wrong = faults_of(record)
    say("\n".join(wrong) or f"{options.steps} steps, {options.faults} faults: the same run, bit by bit")
    sys.exit(bool(wrong))


def soak(folder: Path, *, steps: int, seed: int, count: int) -> dict[str, Any]:
    """The record of both runs. Raises SoakError for a fault that did not end as the documents say."""
    with small_disk(folder / "whole") as (disk, kind), small_disk(folder / "cut") as (other_disk, _):
        kinds = [name for name in FAULTS if kind or name != "disk full"]
        faults = drawn(seed, count, steps, kinds)
        worlds = [make_world(at.parent, at, steps=steps, seed=seed) for at in (disk, other_disk)]
        with ThreadPoolExecutor(len(worlds)) as threads:
            try:
                whole, cut = threads.map(one_run, worlds, [[], faults])
            except BaseException:
                ABANDONED.set()
                raise
        return {
            "steps": steps,
            "seed": seed,
            "disk": kind or "the usual one: this user mounts none, so none was filled",
            "faults": dict(Counter(fault.kind for fault in faults)),
            "differences": ends.differences(whole.pop("metrics"), cut.pop("metrics")),
            "same_weights": whole["weights_sha256"] == cut["weights_sha256"],
            "undisturbed": whole,
            "disturbed": cut,
        }


def one_run(world: World, faults: list[Fault]) -> dict[str, Any]:
    """With servers of its own."""
    started, resumes = time.monotonic(), list[dict[str, Any]]()

    def note(cause: Fault | None, lost: int) -> None:
        resumes.append({"after": cause.kind if cause else "no fault of its own", "steps_lost": lost})
        announce(f"resumed, {lost} steps to be done again")

    watch = Watch(world)
    try:
        world.start_servers()
        write_config(world)
        disturbed(world, faults, note)
        world.stop_servers()
    except BaseException:
        ABANDONED.set()
        raise
    finally:
        watch.close()
        world.end_all()
    return {
        "wall_s": rounded(time.monotonic() - started, 3),
        "resumes": len(resumes),
        "steps_lost": sum(resume["steps_lost"] for resume in resumes),
        "most_steps_lost": max((resume["steps_lost"] for resume in resumes), default=0),
        "resumes_after": dict(Counter(resume["after"] for resume in resumes)),
        "memory": memory(watch),
        "left_behind": ends.left_behind(world, watch.shared),
        "metrics": ends.metrics(world.run),
        "weights_sha256": ends.weights_sha256(world.run),
    }


def memory(watch: Watch) -> dict[str, Any]:
    """By kind of process: how many lived, the growth of those that lived long enough, the longest one's curve."""
    found: dict[str, Any] = {}
    for kind in ("trainer", "sampler", "teacher"):
        lives = [life for life in watch.lives.values() if life.kind == kind]
        growths = [life.growth for life in lives if life.growth is not None]
        longest = max(lives, key=lambda life: life.steps)
        found[kind] = {
            "processes": len(lives),
            "judged": len(growths),
            "growth": [rounded(growth, 2) for growth in growths],
            "curve_step_mib": longest.curve(),
        }
    return found


def faults_of(record: dict[str, Any]) -> list[str]:
    """What is not as it has to be, a line each."""
    wrong = [f"undisturbed and disturbed differ: {difference}" for difference in record["differences"]]
    if not record["same_weights"]:
        wrong.append("the weights are not those of the undisturbed run")
    for run in ("undisturbed", "disturbed"):
        for what, left in record[run]["left_behind"].items():
            wrong += [f"{run}: left behind of {what}: {', '.join(left)}"] if left else []
        for kind, lives in record[run]["memory"].items():
            wrong += [f"{run}: the memory of a {kind} grew by {g:.1%}" for g in lives["growth"] if abs(g) > MARGIN]
    return wrong


if __name__ == "__main__":
    main()
