"""Long work says that it goes on where its output is a file, and only when nothing else is said."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gkd.config import make_config
from gkd.monitor import Monitor
from gkd.monitor.pulse import Pulse


def wait_for(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_silence_is_broken_with_what_goes_on() -> None:
    said: list[str] = []
    pulse = Pulse(said.append, every_s=0.05)
    pulse.task("sampling 512 teacher completions; they are kept\nin the cache")
    pulse.start()
    wait_for(lambda: len(said) >= 2)
    pulse.stop()
    count = len(said)
    time.sleep(0.2)
    assert len(said) == count
    assert said[0].startswith("  sampling 512 teacher completions: ") and said[0].endswith(" so far")


def test_whoever_speaks_needs_no_pulse() -> None:
    said: list[str] = []
    pulse = Pulse(said.append, every_s=30.0)
    pulse.start()
    for _ in range(3):
        pulse.heard()
    pulse.stop()  # at once, and no line at the end
    pulse.stop()
    assert not said


def test_a_run_has_one_unless_a_terminal_shows_its_bar(tmp_path: Path) -> None:
    config = make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}})
    for is_terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal)
        monitor = Monitor(config, tmp_path / str(is_terminal), is_main=True, decode=str, console=console)
        monitor._pulse._every_s = 0.05
        with monitor:
            monitor.note("")
            monitor.note("sampling")
            if is_terminal:
                time.sleep(0.3)
            else:
                wait_for(lambda out=out: "sampling: " in out.getvalue())
        assert ("so far" in out.getvalue()) != is_terminal
