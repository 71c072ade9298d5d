"""`make evidence`: runs that fail or hang are reported, and the others go on."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import run_python

from benchmarks.figures import evidence

SLEEPS_WITH_A_CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(300)
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_what_fails_or_hangs_is_reported_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python, results = sys.executable, tmp_path / "results"
    results.mkdir()
    (results / "old.json").write_text("an earlier evidence's")
    runs = [
        evidence.Run("works", [[python, "-c", "print('said')"], [python, "-c", "print('more')"]], None, 60),
        evidence.Run("fails", [[python, "-c", "raise SystemExit(3)"], [python, "-c", "print('no')"]], "old.json", 60),
        evidence.Run("hangs", [[python, "-c", SLEEPS_WITH_A_CHILD, tmp_path / "child"]], None, 8),
        evidence.Run("last", [[python, "-c", "pass"]], None, 60),
    ]
    outcomes = list(evidence.run_all(runs, tmp_path, time.monotonic() + 100))
    assert [one.status for one in outcomes] == ["ok", "failed with 3", "stopped at its limit", "ok"]
    assert (tmp_path / "logs" / "works.txt").read_text() == "said\nmore\n"
    assert (tmp_path / "logs" / "fails.txt").read_text() == ""
    assert not (results / "old.json").exists()
    assert "[2/4] fails: at most 1 min; 2 min left" in capsys.readouterr().out
    until_s = time.monotonic() + 10
    while is_running(int((tmp_path / "child").read_text())) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not is_running(int((tmp_path / "child").read_text()))


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    run = evidence.Run("late", [[sys.executable, "-c", "pass"]], None, 60)
    (outcome,) = evidence.run_all([run], tmp_path, time.monotonic() - 1)
    assert outcome.status == "no time was left" and not (tmp_path / "logs").exists()


def test_all_of_it_has_time_and_writes_where_claims_look(tmp_path: Path) -> None:
    runs = evidence.runs(tmp_path / "results", tmp_path / "work")
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        command = [str(part) for part in run.commands[-1]]
        assert command[1] == "-m" and find_spec(command[2]) is not None
        assert run.makes is None or str(tmp_path / "results" / run.makes) in command
        assert not any("benchmarks/results" in part for part in command)


def test_one_run_leaves_tables_plots_and_verdicts(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.figures.evidence", "--only", "choosing", "--out", tmp_path]
    done = run_python(command, timeout_s=200)
    assert "[1/1] choosing" in done.stdout and "Traceback" not in done.stderr
    assert len(list((tmp_path / "plots").glob("choosing_*.svg"))) == 3
    assert "## divergence\n\nNot measured yet." in (tmp_path / "tables.md").read_text()
    assert "| claim | committed | now | margin | holds |" in (tmp_path / "claims.md").read_text()
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert done.returncode == bool(wrong) and not any("choosing" in line for line in wrong)
