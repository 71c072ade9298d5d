"""The end of a run: valid files, and a view that fits whatever a model wrote."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gkd.monitor import HeldoutSample, RunSummary, loss_curve, make_console, time_totals
from gkd.monitor.summary_view import bar, render_summary, sparkline

HOSTILE = (
    "```\n# not a heading\n````text\n<script>alert(1)</script> [bold red]x[/] [/nothing] \x1b[2J\x1b]0;t\x07 :smile:"
)
SUMMARY = RunSummary(
    name="quickstart",
    steps=40,
    wall_s=100.0,
    heldout={"heldout_forward_kl": (8.65, 1.73), "heldout_jsd": (0.5, 0.6)},
    time_s={
        "time/sample_s": 30.0,
        "time/score_s": 5.0,
        "time/forward_backward_s": 35.0,
        "time/optimizer_s": 5.0,
        "time/train_s": 40.0,
        "time/sync_s": 3.0,
        "time/other_s": 2.0,
        "time/step_s": 80.0,
    },
    samples=(HeldoutSample("Say hi.", "Hi!", HOSTILE, ""), HeldoutSample("Long?", "yes " * 900, "a\n" * 90, "x" * 999)),
    losses=(8.0, 4.0, math.nan, 2.0),
    final_folder="runs/quickstart/final",
    next_commands=("gkd generate runs/quickstart/final --prompt 'Why is the sky blue, and why is it red at dusk?'",),
    extra={"seed": 0},
)


def shown(summary: RunSummary, width: int = 80, *, terminal: bool = False) -> str:
    file = io.StringIO()
    render_summary(summary, Console(file=file, width=width, force_terminal=terminal, legacy_windows=False))
    return file.getvalue()


def test_the_json_is_flat_strict_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    replace(SUMMARY, heldout={**SUMMARY.heldout, "heldout_reverse_kl": (math.inf, 1.0)}).write_summary_json(path)

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    flat = json.loads(path.read_text(), parse_constant=refuse)
    assert flat["heldout_forward_kl_before"] == 8.65
    assert flat["heldout_forward_kl_after"] == 1.73
    assert flat["heldout_reverse_kl_before"] is None
    assert (flat["steps"], flat["wall_s"], flat["time/train_s"], flat["seed"]) == (40, 100.0, 40.0, 0)
    assert (flat["loss_first"], flat["loss_last"]) == (8.0, 2.0)
    assert not any(isinstance(value, (dict, list)) for value in flat.values())
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_fence_holds_whatever_a_model_wrote(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    SUMMARY.write_samples_markdown(path)
    text = path.read_text(encoding="utf-8")
    assert "\x1b" not in text and "\x07" not in text
    fence, outside = None, []
    for line in text.splitlines():  # CommonMark: a fence is closed by at least as many backticks, alone on a line
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3:
            fence = ticks
        elif fence is not None and ticks >= fence and not line.strip("`").strip():
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert not any("script" in line or "not a heading" in line for line in outside)
    assert [line for line in outside if line.startswith("## ")] == ["## Sample 1", "## Sample 2"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_view_fits_its_width(width: int) -> None:
    commands = {"  " + command for command in SUMMARY.next_commands}
    for line in shown(SUMMARY, width).splitlines():
        assert len(line) <= width or line in commands, "only commands may be longer: they are there to be copied"


def test_the_view_says_what_the_run_came_to() -> None:
    text = shown(SUMMARY)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "quickstart 40 steps in 1m40s" in lines
    assert any(line.startswith("forward KL 8.650 1.730 20.0 % █████▋░") for line in lines)
    assert any(line.startswith("JSD 0.500 0.600 120.0 %") for line in lines)
    assert "where 1m40s went" in lines
    assert any(line.startswith("sample 30s 30 % ████████████") for line in lines)
    assert any(line.startswith("load, evaluate, save 20s 20 %") for line in lines)
    assert "loss 8.000 █▃x▁ 2.000" in lines
    assert "result runs/quickstart/final" in lines
    assert "gkd generate runs/quickstart/final --prompt 'Why is the sky blue, and why is it red at dusk?'" in lines


@pytest.mark.parametrize("terminal", [False, True])
def test_a_models_text_never_acts(terminal: bool) -> None:
    text = shown(SUMMARY, 120, terminal=terminal)
    assert "[bold red]x[/] [/nothing] [2J]0;t :smile:" in text
    assert "\x1b[2J" not in text and "\x1b]" not in text
    assert ("\x1b[" in text) is terminal


def test_long_answers_are_cut() -> None:
    lines = shown(SUMMARY).splitlines()
    assert len(lines) < 70
    assert any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)


def test_a_bare_summary_and_a_perfect_student_are_shown() -> None:
    bare = RunSummary(name="run", steps=1, wall_s=2.0, heldout={"heldout_forward_kl": (0.0, 0.0)})
    lines = [" ".join(line.split()) for line in shown(bare).splitlines()]
    assert "run 1 step in 2.0s" in lines
    assert any(line.startswith("forward KL 0.000 0.000 - ") for line in lines)
    assert bare.samples_markdown().startswith("# Held-out samples of `run`, 1 step\n")


def test_further_times_have_their_own_rows() -> None:
    times = {**SUMMARY.time_s, "time/load_s": 12.0, "time/evaluate_s": 6.0}
    lines = [" ".join(line.split()) for line in shown(replace(SUMMARY, time_s=times)).splitlines()]
    for start in ("evaluate 6.0s 6 %", "load 12s 12 %", "the rest 2.0s 2 %"):
        assert any(line.startswith(start) for line in lines)
    resumed = replace(SUMMARY, wall_s=10.0)  # the times of all sessions, the wall time of the last
    assert "where 1m20s went" in shown(resumed)


def test_an_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    render_summary(SUMMARY, make_console(file))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "####" in text and "loss  8.000 @-x_ 2.000" in text


def test_sparklines_and_bars() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([math.nan, math.inf]) == "xx"
    assert len(sparkline(list(range(1000)), 30)) == 30
    assert [len(bar(x, 10)) for x in (0.0, 0.5, 1.0, 7.0, math.nan, -1.0)] == [0, 5, 10, 10, 0, 0]
    assert bar(0.0125, 10) == "▏"


def test_the_curve_and_the_times_of_all_sessions_come_from_the_records() -> None:
    records = [{"step": 0, "loss": 2.0, "time/sample_s": 1.0}, {"step": 1, "loss": None, "time/sample_s": 2.5}]
    first, second = loss_curve(records)
    assert first == 2.0 and math.isnan(second)
    assert time_totals(records)["time/sample_s"] == 3.5
    assert set(time_totals([])) == set(SUMMARY.time_s)
