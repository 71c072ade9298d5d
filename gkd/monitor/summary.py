"""The end of a run as plain data, and as the files that keep it. `summary_view` draws it in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gkd.files import finite, write_atomically, write_json
from gkd.monitor.metrics import MetricValue
from gkd.monitor.text import clean
from gkd.monitor.timing import PHASES


class HeldoutSample(NamedTuple):
    """A held-out prompt and three answers to it."""

    prompt: str
    teacher: str
    student_before: str
    student_after: str


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run came to. Frozen plain data; nothing here is measured again.

    `heldout` is keyed `heldout_forward_kl` and so on, in nats a scored token. `time_s` has the keys of
    `PhaseTimer.totals`, in seconds; further `time/<what>_s` keys (`time/load_s`, `time/evaluate_s`) stand for time
    outside the steps. `losses` is one number a step. `extra` goes into the JSON as it is.
    """

    name: str
    steps: int
    wall_s: float
    heldout: Mapping[str, tuple[float, float]]
    time_s: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[HeldoutSample, ...] = ()
    losses: tuple[float, ...] = ()
    final_folder: str | None = None
    next_commands: tuple[str, ...] = ()
    extra: Mapping[str, MetricValue] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Flat: name, steps, wall_s, `<heldout name>_before` and `_after`, loss_first, loss_last, `time/*_s`."""
        flat: dict[str, object] = {"name": self.name, "steps": self.steps, "wall_s": self.wall_s}
        for name, (before, after) in self.heldout.items():
            flat[f"{name}_before"], flat[f"{name}_after"] = before, after
        if self.losses:
            flat["loss_first"], flat["loss_last"] = self.losses[0], self.losses[-1]
        flat.update(self.time_s)
        if self.final_folder is not None:
            flat["final_folder"] = self.final_folder
        return finite({**flat, **self.extra})

    def write_summary_json(self, path: str | Path) -> None:
        """Writes `to_dict` as strict JSON (NaN and infinities are null), in one step. Raises OSError."""
        write_json(Path(path), self.to_dict())

    def write_samples_markdown(self, path: str | Path) -> None:
        """Writes the samples for people to read, in one step. Raises OSError."""
        write_atomically(Path(path), self.samples_markdown().encode("utf-8"))

    def samples_markdown(self) -> str:
        """Every text in a fence that it cannot close."""
        name, plural = clean(self.name, " ").replace("`", ""), "" if self.steps == 1 else "s"
        parts = [f"# Held-out samples of `{name}`, {self.steps} step{plural}\n"]
        for number, sample in enumerate(self.samples, start=1):
            parts.append(f"## Sample {number}\n")
            for title, text in zip(("Prompt", "Teacher", "Student before", "Student after"), sample, strict=True):
                parts.append(f"**{title}**\n\n{_fenced(text)}\n")
        return "\n".join(parts)


def loss_curve(records: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """The losses of the records of a metrics.jsonl; one that was not finite is NaN."""
    return tuple(float("nan") if record.get("loss") is None else float(record["loss"]) for record in records)


def time_totals(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`time/*_s` summed over the records of a metrics.jsonl: all sessions of a run that was resumed."""
    keys = [f"time/{name}_s" for name in (*PHASES, "train", "other", "step")]
    totals = dict.fromkeys(keys, 0.0)
    for record in records:
        for key in keys:
            totals[key] += record.get(key) or 0.0
    return totals


def _fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks within."""
    text = clean(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
