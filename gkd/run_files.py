"""The names of what lies in the folder of a run: the run writes it, `gkd report` and `gkd watch` read it.

config.resolved.json  environment.json  inputs.json  metrics.jsonl  heldout_positions.jsonl  samples.md  summary.json
exit.json  samples/first_batch.txt  samples/tokens_before.json  samples/tokens_after.json  logs/rank_N.log
checkpoints/step_N  final/  previous/ (the run before, in the same names)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

REPORT_PICTURES = ("loss", "time", "positions")  # beside a report


class RunFiles:
    """Paths in the folder `path`; none of them has to exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path / ".gkd-run"  # whose folder it is; whoever uses it holds its lock
        self.previous = path / "previous"
        self.config = path / "config.resolved.json"
        self.environment = path / "environment.json"
        self.inputs = path / "inputs.json"
        self.metrics = path / "metrics.jsonl"
        self.before = path / "before.json"
        self.positions = path / "heldout_positions.jsonl"
        self.summary = path / "summary.json"
        self.exit = path / "exit.json"
        self.samples = path / "samples.md"
        self.samples_folder = path / "samples"
        self.first_batch = self.samples_folder / "first_batch.txt"
        self.tokens_before = self.samples_folder / "tokens_before.json"
        self.tokens_after = self.samples_folder / "tokens_after.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.student_init = path / "student_init"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.wandb_id = path / "wandb_run_id"
        self.report = path / "report.html"
        self.evaluation = path / "eval.json"
        self.evaluation_page = path / "eval.md"

    @property
    def of_one_run(self) -> tuple[Path, ...]:
        """What the next run in the same folder must not find."""
        return (
            self.config,
            self.environment,
            self.inputs,
            self.metrics,
            self.before,
            self.positions,
            self.summary,
            self.exit,
            self.samples,
            self.samples_folder,
            self.logs,
            self.checkpoints,
            self.final,
            self.student_init,
            self.tensorboard,
            self.wandb,
            self.wandb_id,
            self.report,
            *(picture_beside(self.report, what) for what in REPORT_PICTURES),
            self.evaluation,
            self.evaluation_page,
        )


def picture_beside(report: Path, what: str) -> Path:
    """Where a picture of REPORT_PICTURES is."""
    return report.with_name(f"{report.stem}.{what}.png")


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl or heldout_positions.jsonl: an object with its step; None for anything else."""
    record: Any
    try:
        record = json.loads(line)
    except ValueError:  # JSON and UTF-8 errors alike
        return None
    if not isinstance(record, dict):
        return None
    values = cast("dict[str, Any]", record)
    return values if isinstance(values.get("step"), int) else None
