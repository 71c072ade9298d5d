"""Time and memory of a step against batch, length, vocabulary and ranks: python -m benchmarks.runs.scaling [--quick]

A random teacher and a student of half its layers are distilled by `gkd train` for a few steps at each point, one size
doubled at a time, one thread a rank. A line through the logarithms of seconds (or bytes) and size gives the growth
exponent: 1 is proportional, 0 does not grow. Beside it stands the exponent of what `gkd plan` predicts for the same
points, so a part that grows faster than its arithmetic shows. Memory is the largest rank's resident set above that of
a run with next to no model. Results go to --out, one JSON, from which `make tables` makes table and plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, command, say
from benchmarks.runs.planned import planned_setup
from benchmarks.runs.random_model import Size, run_config, save_model
from gkd.config import Config
from gkd.files import write_json
from gkd.monitor import read_metrics
from gkd.planning.devices import device_named
from gkd.planning.measure import measured
from gkd.planning.memory import memory_plan
from gkd.planning.time import time_plan

PHASES = ("sample", "score", "train", "sync", "step")
NOT_COUNTED = 1  # the first step allocates


@dataclass(frozen=True)
class Point:
    """One run: an axis and the value that it has on it; everything else is the base's."""

    axis: str
    value: int
    size: Size
    ranks: int


def main() -> None:
    options = arguments()
    warn_if_busy()
    os.environ["OMP_NUM_THREADS"] = "1"
    record = {
        "command": command(),
        **environment("cpu"),
        "threads": 1,
        "sampler": "transformers" if options.quick else "vllm",
        "steps": options.steps,
        "base": asdict(base(options.quick)),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), record["sampler"], options.steps)
        floor_bytes = bench.run(floor(options.quick))["peak_bytes"]
        points = []
        for point in grid(options.quick):
            found = bench.run(point)
            found["memory_bytes"] = max(1, found.pop("peak_bytes") - floor_bytes)
            points.append({"axis": point.axis, "value": point.value, **found})
            say(f"{point.axis:<10} {point.value:>6}  {found['seconds']['step']:.2f} s a step")
    record |= {"floor_bytes": floor_bytes, "points": points, "exponents": exponents(points)}
    show(record)
    write_json(options.out, record)
    say(f"{options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiny points an axis: does it work at all")
    parser.add_argument("--steps", type=int, default=6, help=f"a run, of which the first {NOT_COUNTED} is not counted")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.json")
    options = parser.parse_args()
    if options.steps <= NOT_COUNTED:
        parser.error(f"--steps: {options.steps} must be more than the {NOT_COUNTED} that is not counted")
    return options


# ---- what is run


def base(quick: bool) -> Size:
    if quick:
        return Size(2, 64, 1024, batch_size=4, micro_batch_size=2, max_prompt_tokens=48, max_new_tokens=8)
    return Size(8, 512, 16384, batch_size=16, micro_batch_size=8, max_prompt_tokens=48, max_new_tokens=32)


def floor(quick: bool) -> Point:
    """What libraries and processes take: hardly a model and hardly a batch."""
    size = Size(2, 64, 512, batch_size=2, micro_batch_size=1, max_prompt_tokens=48, max_new_tokens=2)
    return Point("floor", 0, replace(size, max_prompt_tokens=base(quick).max_prompt_tokens), ranks=1)


def grid(quick: bool) -> list[Point]:
    """The base, and each axis doubled from half of it up (ranks from one to two)."""
    here = base(quick)
    factors = (1.0, 2.0) if quick else (0.5, 1.0, 2.0, 4.0)
    points = []
    for axis in ("batch_size", "max_new_tokens", "vocabulary"):
        for factor in factors:
            value = int(factor * getattr(here, axis))
            points.append(Point(axis, value, replace(here, **{axis: value}), ranks=1))
    return [*points, *(Point("ranks", ranks, here, ranks) for ranks in (1, 2))]


class Bench:
    """Runs points in child processes; equal runs only once."""

    def __init__(self, folder: Path, sampler: str, steps: int) -> None:
        self._folder, self._sampler, self._steps = folder, sampler, steps
        self._device = measured(device_named("cpu"))
        self._done: dict[tuple[Size, int], dict[str, Any]] = {}

    def run(self, point: Point) -> dict[str, Any]:
        """Measured and planned seconds by phase and bytes. Raises CalledProcessError if the run fails."""
        key = (point.size, point.ranks)
        if key not in self._done:
            self._done[key] = self._run(point)
        return json.loads(json.dumps(self._done[key]))  # a copy

    def _run(self, point: Point) -> dict[str, Any]:
        size, ranks = point.size, point.ranks
        folder = self._folder / f"run_{len(self._done)}"
        teacher = folder / "teacher"
        save_model(teacher, size.layers, size.hidden, size.vocabulary)
        config = run_config(size, teacher, folder / "run", self._sampler, self._steps)
        path = folder / "config.json"  # JSON is YAML
        path.write_text(config.model_dump_json())
        peak_bytes = peak_of([*launcher(ranks), "-m", "gkd", "train", str(path)], folder / "log.txt")
        steps = read_metrics(config.run.folder / "metrics.jsonl")[NOT_COUNTED:]
        seconds = {phase: statistics.median(step[f"time/{phase}_s"] for step in steps) for phase in PHASES}
        return {"seconds": seconds, "peak_bytes": peak_bytes, **self._planned(config, ranks)}

    def _planned(self, config: Config, ranks: int) -> dict[str, Any]:
        setup = planned_setup(config, self._device, ranks)
        plan = time_plan(setup)
        seconds = {phase: plan.phase_s(phase) for phase in ("sample", "score", "sync")}
        seconds |= {"train": plan.phase_s("forward_backward") + plan.phase_s("optimizer"), "step": plan.step_s}
        return {"planned_seconds": seconds, "planned_memory_bytes": memory_plan(setup).peak_bytes}


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def peak_of(command: Sequence[str], log: Path) -> int:
    """Runs it to its end; the resident set of its largest process, in bytes."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(code, list(command))
    return usage.ru_maxrss * 1024


# ---- what came of it


def exponents(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{axis: {phase or "memory": {"measured": exponent, "planned": exponent}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for axis in dict.fromkeys(point["axis"] for point in points):
        here = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in here]
        found[axis] = {
            phase: {
                "measured": growth(values, (point["seconds"][phase] for point in here)),
                "planned": growth(values, (point["planned_seconds"][phase] for point in here)),
            }
            for phase in PHASES
        }
        found[axis]["memory"] = {
            "measured": growth(values, (point["memory_bytes"] for point in here)),
            "planned": growth(values, (point["planned_memory_bytes"] for point in here)),
        }
    return found


def growth(sizes: Iterable[float], amounts: Iterable[float]) -> float:
    """The slope of a least-squares line through (log size, log amount)."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(a) for a in amounts])
    return round(slope, 3)


def show(record: dict[str, Any]) -> None:
    print(f"{record['device']}, 1 thread a rank; {record['versions']}")
    print("growth exponent, measured (planned)")
    for axis, phases in record["exponents"].items():
        cells = "  ".join(
            f"{name} {found['measured']:5.2f} ({found['planned']:5.2f})" for name, found in phases.items()
        )
        print(f"  {axis:<15} {cells}")


if __name__ == "__main__":
    main()
