"""What the parts of the benchmark share: its settings, and jobs whose results are kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import say
from benchmarks.runs.versus_trl.job import Job, Work
from benchmarks.runs.versus_trl.launch import is_done, launched
from benchmarks.runs.versus_trl.summary import round_figures

DISTILLATION = "TRL DistillationTrainer"
TRAINERS = {DISTILLATION: "distillation", "TRL GKDTrainer": "gkd"}
# The same trainer as gkd trains, which is a contender of its own where it is faster otherwise.
FLOAT32_WEIGHTS = f"{DISTILLATION}, float32 weights"


def trainer_of(contender: str) -> str:
    return TRAINERS[contender.partition(",")[0]]


@dataclass(frozen=True)
class Benchmark:
    """One command's settings; `folder` is the work's own."""

    work: Work
    rounds: int
    smoke: bool
    trials: bool  # whether to look for each TRL trainer's fastest settings
    folder: Path

    def run(self, role: str, name: str, work: Work | None = None, **options: Any) -> dict[str, Any]:
        """A job's result, from the disk if it is there. Raises JobError."""
        job = Job(role, work or self.work, options, str(self.folder / f"{name}.json"))
        done_before = is_done(job)
        start_s = time.perf_counter()
        result = launched(job)
        taken = "measured before" if done_before else f"{time.perf_counter() - start_s:.0f} s"
        speed = f", {round_figures(result)['step_s']:.2f} s a step" if "steps" in result else ""
        say(f"  {name:<36} {taken}{speed}")
        return result
