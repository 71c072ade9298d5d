"""Progress: one plain line a step off a terminal, a bar on one, and no text that acts as markup."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console
from rich.text import Text

from gkd.monitor import QuietProgress, TerminalProgress, make_console
from gkd.monitor.terminal import status
from gkd.monitor.text import format_duration, format_rate, format_value

METRICS = {"step": 11, "loss": 1.234, "divergence/forward_kl": 1.24, "tokens/scored_per_s": 812.3, "time/step_s": 4.0}


def _console(*, terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, color_system="standard", legacy_windows=False), file


def test_off_a_terminal_a_step_is_exactly_one_line() -> None:
    console, file = _console(terminal=False, width=20)
    progress = TerminalProgress(40, 0, console)
    progress.start()
    progress.phase("sample")
    progress.update(11, METRICS)
    progress.stop()
    assert file.getvalue() == "step 12/40  loss 1.234  fkl 1.240  812 tok/s  4.0 s/step  eta 1m52s\n"


def test_the_time_left_follows_recent_steps() -> None:
    console, file = _console(terminal=False)
    progress = TerminalProgress(4, 0, console)
    progress.update(0, {"loss": 1.0, "time/step_s": 10.0})
    progress.update(1, {"loss": 1.0, "time/step_s": 20.0})
    assert file.getvalue().splitlines()[-1].endswith("20.0 s/step  eta 30s")


def test_notes_are_plain_text() -> None:
    console, file = _console(terminal=False)
    progress = TerminalProgress(1, 0, console)
    progress.note("a [bold]note[/bold] \x1b[2J:smile:" + "x" * 100)
    assert file.getvalue() == "a [bold]note[/bold] [2J:smile:" + "x" * 100 + "\n"


def test_a_terminal_gets_a_bar_and_its_cursor_back() -> None:
    console, file = _console(terminal=True)
    progress = TerminalProgress(40, 10, console)
    progress.start()
    progress.phase("forward_backward")
    progress.update(11, METRICS)
    progress.note("above")
    progress.stop()
    progress.stop()
    shown = file.getvalue()
    assert "\x1b[?25l" in shown and shown.rstrip().endswith("\x1b[?25h")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "above\n" in plain
    assert "12/40" in plain
    assert "loss 1.234  fkl 1.240  812 tok/s  eta 1m52s" in plain
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 80


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console, file = _console(terminal=True)
    progress = TerminalProgress(40, 0, console)
    progress.start()
    progress.update(0, METRICS)
    progress.stop()
    assert file.getvalue().startswith("step 1/40  loss")


def test_missing_and_odd_values_are_left_out() -> None:
    assert status({"loss": math.nan}, math.nan) == "loss nan"
    assert (
        status({"divergence/forward_kl": 1e-5, "tokens/scored_per_s": 25000}, 0) == "fkl 1.0e-05  25.0k tok/s  eta 0.0s"
    )


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = QuietProgress()
    quiet.start()
    quiet.phase("sample")
    quiet.update(0, METRICS)
    quiet.note(Text("x"))
    quiet.stop()
    assert capsys.readouterr() == ("", "")


def test_an_encoding_without_a_character_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    TerminalProgress(1, 0, make_console(file)).note("caf\u00e9 \u23ce")
    file.flush()
    assert raw.getvalue() == b"caf? ?\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (59.6, "1m00s"),
        (112, "1m52s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (273600, "3d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_numbers() -> None:
    assert [format_value(x) for x in (0.0, 1.23456, 0.00012, -0.5, math.inf)] == [
        "0.000",
        "1.235",
        "1.2e-04",
        "-0.500",
        "inf",
    ]
    assert [format_rate(x) for x in (0.0, 8.25, 812.4, 9999, 12345, 4.5e6)] == [
        "0.0",
        "8.2",
        "812",
        "9999",
        "12.3k",
        "4.5M",
    ]
