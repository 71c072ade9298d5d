"""What a run's checks of itself cost: their own timers over the seconds of a step, and of the start.

python -m benchmarks.runs.checks_cost [--steps 8] [--out FILE] [section.key=value ...]

The run is that of configs/quickstart.yaml, in a folder of its own. Timed are the calls that only prove something: the
checksums of what is sent to the sampler and of what it holds, the guards of a step, the fingerprints of models, and the
look for weights that are not finite. A call within another counts once. The share is of medians over the steps but the
first; the probe of a sync, which is older than these, stands apart.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, ROOT, command, rounded, say
from gkd.config import load_config
from gkd.files import write_json
from gkd.monitor import read_metrics
from gkd.run_files import RunFiles
from gkd.train.distiller import Distiller

CONFIG = "configs/quickstart.yaml"
CHECKS = {  # what is timed: module, object, function
    "checksums of what is sent": ("gkd.models.held", "WeightChecksums", "add"),
    "checksums of what is held": ("gkd.rollout.sync", "SyncedSampler", "_compare_contents"),
    "finite gradients": ("gkd.train.guards", "FiniteGuard", "_watch"),
    "finite loss": ("gkd.train.guards", "FiniteGuard", "check"),
    "mismatch": ("gkd.train.guards", "MismatchGuard", "check"),
    "loss scale": ("gkd.train.guards", "LossScaleGuard", "check"),
    "reading every byte of the models": ("gkd.digests", "", "_read"),
    "finite weights": ("gkd.models.load", "", "_check_finite"),
    "the trainer's rounding": ("gkd.rollout.sync", "SyncedSampler", "measure_rounding"),
}


class Timers:
    """Seconds by what is timed: of the start, and of each step, which `next_step` begins and `end` closes."""

    def __init__(self) -> None:
        self.start: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self._now, self._depth = self.start, 0

    def next_step(self) -> None:
        self._now = defaultdict(float)
        self.steps.append(self._now)

    def end(self) -> None:
        self._now = defaultdict(float)

    def install(self) -> None:
        for label, (module, owner, name) in CHECKS.items():
            place: Any = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            setattr(place, name, self._timed(label, getattr(place, name)))

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:  # else it is in what the outer call took
                    self._now[label] += time.perf_counter() - started_s

        return timed


def main() -> None:
    options = arguments()
    warn_if_busy()
    timers = Timers()
    timers.install()
    run_with(timers, options)
    seconds = [record["time/step_s"] for record in read_metrics(RunFiles(options.work / "run").metrics)][1:]
    counted = timers.steps[1:]
    labels = sorted({label for step in counted for label in step})
    by_label = {label: statistics.median(step[label] for step in counted) for label in labels}
    step_s = statistics.median(seconds)
    record = {
        "command": command(),
        **environment("cpu"),
        "config": CONFIG,
        "steps": len(seconds),
        "step_s": rounded(step_s),
        "checks_s": {label: rounded(value, 3) for label, value in by_label.items()},
        "share_of_a_step": rounded(sum(by_label.values()) / step_s, 3),
        "start_checks_s": {label: rounded(value, 3) for label, value in sorted(timers.start.items())},
        "start_s": rounded(sum(timers.start.values()), 3),
    }
    write_json(options.out, record)
    say(f"a step: {record['share_of_a_step']:.2%} of {step_s:.2f} s; the start: {record['start_s']} s")
    say(str(options.out))


def run_with(timers: Timers, options: argparse.Namespace) -> None:
    from gkd.monitor import Monitor

    steps = Monitor.steps

    def counted(monitor: Monitor) -> Any:
        for step in steps(monitor):
            timers.next_step()
            yield step
        timers.end()

    Monitor.steps = counted  # pyright: ignore[reportAttributeAccessIssue]
    data = [f"data.{name}={ROOT / 'configs/prompts' / name}.jsonl" for name in ("train", "heldout")]
    own = [f"run.dir={options.work / 'run'}", f"run.steps={options.steps}"]
    Distiller(load_config(ROOT / CONFIG, [*data, *own, *options.overrides])).train(overwrite=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/checks_cost"))
    parser.add_argument("--out", type=Path, default=RESULTS / "checks_cost_cpu.json")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


if __name__ == "__main__":
    main()
