"""What a run shows while it goes on: a bar on a terminal, exactly one plain line a step elsewhere."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from gkd.monitor.metrics import MetricValue
from gkd.monitor.text import clean, format_duration, format_rate, format_value

_PHASE_LABELS = {"forward_backward": "train", "optimizer": "optimize"}
_RECENT_STEPS = 20  # the estimate of the time left follows a run whose completions grow
_REFRESH_PER_S = 4  # the bar must not take a core from the CPU sampler


class RunProgress(Protocol):
    """What the monitor tells of a run."""

    def start(self) -> None: ...

    def phase(self, name: str | None) -> None: ...

    def update(self, step: int, metrics: Mapping[str, MetricValue]) -> None: ...

    def note(self, text: str | Text) -> None: ...

    def stop(self) -> None: ...


def make_console(file: TextIO | None = None) -> Console:
    """A console that shows a character its encoding lacks as `?`, rather than ending a run with an error."""
    stream = file if file is not None else sys.stdout
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return Console(file=stream, highlight=False)


class QuietProgress:
    """The progress of ranks other than the main one: says nothing."""

    def start(self) -> None: ...

    def phase(self, name: str | None) -> None: ...

    def update(self, step: int, metrics: Mapping[str, MetricValue]) -> None: ...

    def note(self, text: str | Text) -> None: ...

    def stop(self) -> None: ...


class TerminalProgress:
    """Steps done, loss, divergence, tokens/s and time left; `start_step` is the first step that is run."""

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console if console is not None else make_console()
        self._total, self._start_step = total_steps, start_step
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._bar: Progress | None = None

    @property
    def draws(self) -> bool:
        """Whether there is a terminal for the bar; elsewhere all is lines."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def start(self) -> None:
        """Shows the bar, where there is a terminal. `stop` must follow."""
        if self._bar is not None or not self.draws:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[phase]:<8}", style="dim", markup=False),
            console=self.console,
            refresh_per_second=_REFRESH_PER_S,
            expand=True,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._start_step, status="", phase="")
        self._bar.start()

    def phase(self, name: str | None) -> None:
        """Shows what the run is doing just now; None: nothing with a name."""
        if self._bar is not None:
            self._bar.update(self._task, phase=_PHASE_LABELS.get(name or "", name or ""))

    def update(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Step `step` (from 0) is done. Reads loss, divergence/forward_kl, tokens/scored_per_s and time/step_s."""
        self._step_seconds.append(_number(metrics, "time/step_s") or 0.0)
        left_s = (self._total - step - 1) * sum(self._step_seconds) / len(self._step_seconds)
        if self._bar is None:
            self._line(f"step {step + 1}/{self._total}  {status(metrics, left_s, with_step_time=True)}")
        else:
            self._bar.update(self._task, completed=step + 1, status=status(metrics, left_s))

    def note(self, text: str | Text) -> None:
        """Prints above the bar, or as lines. A string is plain text: neither markup nor escape codes act."""
        if isinstance(text, Text):
            self.console.print(text)
        else:
            self._line(clean(text))

    def stop(self) -> None:
        """Leaves the bar as it is and gives the terminal back; may be called twice."""
        if self._bar is not None:
            self.phase(None)
            self._bar.stop()
            self._bar = None

    def _line(self, line: str) -> None:
        # soft_wrap: one line stays one line in a file, however long
        self.console.print(Text(line), soft_wrap=True)


def status(metrics: Mapping[str, MetricValue], left_s: float, *, with_step_time: bool = False) -> str:
    """`loss 1.234  fkl 1.240  812 tok/s  4.1 s/step  eta 1m52s`, without what the metrics lack."""
    parts: list[str] = []
    for label, name in (("loss", "loss"), ("fkl", "divergence/forward_kl")):
        if (value := _number(metrics, name)) is not None:
            parts.append(f"{label} {format_value(value)}")
    if (rate := _number(metrics, "tokens/scored_per_s")) is not None:
        parts.append(f"{format_rate(rate)} tok/s")
    if with_step_time and (seconds := _number(metrics, "time/step_s")) is not None:
        parts.append(f"{seconds:.1f} s/step")
    if math.isfinite(left_s):
        parts.append(f"eta {format_duration(left_s)}")
    return "  ".join(parts)


def _number(metrics: Mapping[str, MetricValue], name: str) -> float | None:
    value = metrics.get(name)
    return None if value is None or isinstance(value, str) else float(value)
