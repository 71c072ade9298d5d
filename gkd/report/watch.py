"""A run as seen from outside, by its folder: for the terminal of someone who did not start it."""

from __future__ import annotations

import math
import os
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gkd.errors import RunFolderError
from gkd.monitor.metrics import METRICS, MetricValue, description_of, in_order
from gkd.monitor.summary_view import bar, sparkline
from gkd.monitor.terminal import status
from gkd.monitor.text import clean, format_duration, format_rate, format_value
from gkd.monitor.titles import DIVERGENCE_TITLES, PHASE_TITLES
from gkd.report.data import is_finished, read_object
from gkd.run_files import RunFiles, parse_record

_RECENT_STEPS = 20  # for the time left and the phases
_CURVES = (
    "loss",
    "objective/",
    "divergence/",
    "entropy/",
    "agreement/",
    "tokens/scored_per_s",
    "grad_norm",
    "sync/mean_logprob_error",
)
_MAX_WIDTH = 100
_LATE_STEPS, _LATE_S = 5, 30.0  # a run is called silent after so many steps' time, but not before so many seconds


class MetricsFollower:
    """Reads what is new in a metrics.jsonl: it may not exist yet, end in half a line, be cut short or be replaced.

    `columns` has one float a record for each metric (NaN: not finite, or not there); `steps` has the records' steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._forget()

    def poll(self) -> list[dict[str, Any]]:
        """The records that are new since the last call; all of them if the file was replaced or cut short."""
        self._reopen_if_replaced()
        if self._file is None:
            return []
        content = self._torn + self._file.read()
        *lines, self._torn = content.split(b"\n")
        records = [record for line in lines if (record := parse_record(line)) is not None]
        for record in records:
            self._add(record)
        return records

    @property
    def last(self) -> dict[str, Any]:
        """The newest record; {} if there is none."""
        return self._last

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen_if_replaced(self) -> None:
        """The open file keeps its inode from being used again, so another inode is another file."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            now = None
        if self._file is not None:
            held = os.fstat(self._file.fileno())
            if now is not None and held.st_ino == now.st_ino and held.st_size >= self._file.tell():
                return
            self.close()
            self._forget()
        if now is not None:
            self._file = self.path.open("rb")

    def _forget(self) -> None:
        self.steps: list[int] = []
        self.columns: dict[str, array[float]] = {}
        self._last: dict[str, Any] = {}
        self._torn = b""

    def _add(self, record: dict[str, Any]) -> None:
        count = len(self.steps)
        self.steps.append(record["step"])
        self._last = record
        for name, value in record.items():
            column = self.columns.setdefault(name, array("d"))
            column.extend([math.nan] * (count - len(column)))
            column.append(value if isinstance(value, int | float) else math.nan)


class RunWatch:
    """How a run stands. `refresh` looks at the folder, `render` shows what it found.

    Raises RunFolderError if the folder is missing. `clock` is `time.time`: it is compared with the files' times.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder")
        self.folder = folder
        self._files = RunFiles(folder)
        self.follower = MetricsFollower(self._files.metrics)
        self._clock = clock
        self.refresh()

    def refresh(self) -> list[dict[str, Any]]:
        """Reads the folder; returns the new records."""
        new = self.follower.poll()
        self.config = _object_or_nothing(self._files.config)
        self.before = _section(_object_or_nothing(self._files.before), "heldout")
        self.summary = _object_or_nothing(self._files.summary)
        return new

    @property
    def steps_done(self) -> int:
        return self.follower.steps[-1] + 1 if self.follower.steps else 0

    @property
    def total_steps(self) -> int | None:
        total = _section(self.config, "run").get("steps")
        return total if isinstance(total, int) else None

    @property
    def finished(self) -> bool:
        return bool(self.follower.steps) and is_finished(self.summary, self.config, self.steps_done)

    @property
    def step_s(self) -> float:
        """Mean seconds of the recent steps; NaN before the first."""
        return self._recent_mean("time/step_s")

    @property
    def left_s(self) -> float:
        """Seconds left; NaN if unknown."""
        return (self.total_steps - self.steps_done) * self.step_s if self.total_steps else math.nan

    def line(self, record: dict[str, Any]) -> str:
        """A record as a run itself would print it."""
        total = "?" if self.total_steps is None else self.total_steps
        left_s = (self.total_steps - record["step"] - 1) * self.step_s if self.total_steps else math.nan
        metrics: dict[str, MetricValue] = {name: value for name, value in record.items() if value is not None}
        return f"step {record['step'] + 1}/{total}  {status(metrics, left_s, with_step_time=True)}"

    def render(self, width: int, *, ascii_only: bool = False) -> RenderableType:
        """The whole view, at most `width` columns wide."""
        parts: list[RenderableType] = [self._headline()]
        if not self.follower.steps:
            return Group(*parts, Text("no step is recorded yet", style="dim"))
        parts.append(self._progress(width, ascii_only))
        parts += [Text(), self._curves(width, ascii_only)]
        if any(name in self.follower.columns for name in _phase_names()):
            parts += [Text(), self._phases(width, ascii_only)]
        if heldout := self._heldout():
            parts += [Text(), heldout]
        return Group(*parts)

    def _headline(self) -> Text:
        name = _section(self.config, "run").get("name") or self.folder.resolve().name
        state, style = self._state()
        return Text.assemble((clean(str(name), " "), "bold"), "  ", (state, style))

    def _state(self) -> tuple[str, str]:
        if self.finished:
            return f"finished in {format_duration(float(self.summary.get('wall_s') or 0))}", "green"
        age_s = self._age_s()
        if age_s is None:
            return "not started", "dim"
        late_s = max(_LATE_S, _LATE_STEPS * self.step_s) if math.isfinite(self.step_s) else _LATE_S
        if self.follower.steps and age_s > late_s:
            return f"no new step for {format_duration(age_s)}", "yellow"
        return "running", "cyan"

    def _age_s(self) -> float | None:
        """Seconds since the file of metrics was written; None without one."""
        try:
            return max(0.0, self._clock() - self.follower.path.stat().st_mtime)
        except FileNotFoundError:
            return None

    def _progress(self, width: int, ascii_only: bool) -> Text:
        done, total = self.steps_done, self.total_steps
        if not total:
            return Text(f"{done} steps")
        left = "" if self.finished or not math.isfinite(self.left_s) else f"  eta {format_duration(self.left_s)}"
        label = f"step {done}/{total}"
        room = max(8, min(60, width - len(label) - len(left) - 10))
        filled = bar(done / total, room, ascii_only=ascii_only)
        track = ("." if ascii_only else "░") * (room - len(filled))
        return Text.assemble(label, "  ", (filled, "cyan"), (track, "dim"), f" {done / total:4.0%}", left)

    def _curves(self, width: int, ascii_only: bool) -> Table:
        table = _table(3)
        table.columns[1].justify = "right"
        names = [name for name in in_order(self.follower.columns) if name.startswith(_CURVES)]
        room = max(8, min(48, width - 40))
        for name in names:
            column = self.follower.columns[name]
            unit = (description_of(name) or "").split(":")[0]
            value = format_rate(column[-1]) if unit == "tokens/s" else format_value(column[-1])
            curve = sparkline(column, room, ascii_only=ascii_only)
            table.add_row(Text(_curve_label(name)), Text(value, style="bold"), Text(curve, style="cyan"))
        return table

    def _phases(self, width: int, ascii_only: bool) -> Table:
        table = _table(4)
        table.columns[1].justify = table.columns[2].justify = "right"
        means = {title: self._recent_mean(name) for name, title in _phase_names().items()}
        means = {title: mean for title, mean in means.items() if math.isfinite(mean)}
        whole = sum(means.values()) or 1.0
        for title, mean in means.items():
            share = bar(mean / whole, max(8, min(40, width - 40)), ascii_only=ascii_only)
            percent = Text(f"{mean / whole:.0%}".replace("%", " %"), style="bold")
            table.add_row(Text(title), Text(f"{mean:.2f} s"), percent, Text(share, style="cyan"))
        return table

    def _heldout(self) -> Table | None:
        """Before, and the latest figure of those that were measured since."""
        names = [name for name in METRICS if name.startswith("heldout/")]
        rows = []
        for name in names:
            before = self.before.get(name)
            after = self.summary.get(f"{name.replace('/', '_')}_after") if self.finished else self._latest(name)
            if before is not None or after is not None:
                rows.append((DIVERGENCE_TITLES[name.removeprefix("heldout/")], before, after))
        if not rows:
            return None
        table = _table(4)
        for column in table.columns[1:]:
            column.justify = "right"
        header = ("held-out, nats a token", "before", "after" if self.finished else "latest", "left")
        table.add_row(*(Text(cell, style="dim") for cell in header))
        for title, before, after in rows:
            left = f"{after / before:.1%}".replace("%", " %") if before and after is not None else "-"
            figures = ["-" if value is None else format_value(value) for value in (before, after)]
            table.add_row(Text(title), Text(figures[0]), Text(figures[1], style="bold"), Text(left))
        return table

    def _latest(self, name: str) -> float | None:
        column = self.follower.columns.get(name, ())
        return next((value for value in reversed(column) if math.isfinite(value)), None)

    def _recent_mean(self, name: str) -> float:
        recent = self.follower.columns.get(name, array("d"))[-_RECENT_STEPS:]
        return sum(recent) / len(recent) if recent else math.nan


def show_once(folder: Path, console: Console) -> None:
    """Prints how the run stands. Raises RunFolderError if the folder is missing."""
    watch = RunWatch(folder)
    watch.follower.close()
    _print_view(watch, console)


def watch_run(
    folder: Path, console: Console, *, interval_s: float = 1.0, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Shows the run until it has ended: a view that is kept up to date on a terminal, a line a step elsewhere.

    Raises RunFolderError if the folder is missing, KeyboardInterrupt on Ctrl-C.
    """
    watch = RunWatch(folder)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _watch_live(watch, console, interval_s, sleep)
        else:
            _watch_lines(watch, console, interval_s, sleep)
    finally:
        watch.follower.close()


def _watch_live(watch: RunWatch, console: Console, interval_s: float, sleep: Callable[[float], None]) -> None:
    with Live(_view(watch, console), console=console, auto_refresh=False) as live:
        while not watch.finished:
            sleep(interval_s)
            watch.refresh()
            live.update(_view(watch, console), refresh=True)


def _watch_lines(watch: RunWatch, console: Console, interval_s: float, sleep: Callable[[float], None]) -> None:
    """The newest step at the start, then each new one; the view at the end."""
    new: Sequence[dict[str, Any]] = [watch.follower.last] if watch.follower.last else []
    while True:
        for record in new:
            console.print(Text(watch.line(record)), soft_wrap=True)
        if watch.finished:
            break
        sleep(interval_s)
        new = watch.refresh()
    _print_view(watch, console)


def _print_view(watch: RunWatch, console: Console) -> None:
    console.print(_view(watch, console))


def _view(watch: RunWatch, console: Console) -> RenderableType:
    return watch.render(min(console.width, _MAX_WIDTH), ascii_only=console.options.ascii_only)


def _table(columns: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(columns):
        table.add_column(no_wrap=True)
    return table


def _phase_names() -> dict[str, str]:
    return {f"time/{phase}_s": title for phase, title in PHASE_TITLES.items()}


def _curve_label(name: str) -> str:
    prefix, _, rest = name.partition("/")
    if prefix == "divergence":
        return DIVERGENCE_TITLES.get(rest, rest.replace("_", " "))
    labels = {
        "agreement/top1": "same top token",
        "tokens/scored_per_s": "tokens a second",
        "grad_norm": "gradient norm",
        "sync/mean_logprob_error": "sync error",
    }
    return labels.get(name, f"{prefix} of {rest}" if rest else name)


def _object_or_nothing(path: Path) -> dict[str, Any]:
    """As `read_object`, but what is damaged counts as not there: whoever watches can mend nothing."""
    try:
        return read_object(path)
    except RunFolderError:
        return {}


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}
