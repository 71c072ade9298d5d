"""gkd report and gkd watch, as processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import check, environment, run_gkd, run_python
from run_folders import make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "one", 12)


def test_a_report_lies_in_the_run_folder(run_folder: Path) -> None:
    result = check(run_gkd(["report", run_folder]))
    page = run_folder / "report.html"
    assert result.stdout.splitlines()[0] == str(page) and page.read_text().startswith("<!doctype html>")
    for line in result.stdout.splitlines():
        assert Path(line).exists()


def test_several_runs_and_no_pictures(run_folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", 3, total_steps=9)
    result = check(run_gkd(["report", run_folder, other, "--no-png"], cwd=tmp_path))
    assert result.stdout == "report.html\n" and "2 runs" in (tmp_path / "report.html").read_text()
    out = tmp_path / "new" / "page.html"
    assert check(run_gkd(["report", run_folder, other, "--out", out, "--no-png"])).stdout == f"{out}\n"


def test_without_matplotlib_the_page_is_written(run_folder: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from gkd.cli.main import main; main()"
    result = check(run_python(["-c", code, "report", run_folder]))
    assert result.stdout == f"{run_folder / 'report.html'}\n"
    assert result.stderr.count("\n") == 1 and "pip install 'gkd[plots]'" in result.stderr


def test_bad_input_is_one_line_and_exit_code_2(run_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (["report", tmp_path / "missing"], f"{tmp_path / 'missing'}: no such folder"),
        (["report", run_folder, empty], f"{empty}: not a run folder"),
        (["report", run_folder, run_folder], "named twice"),
        (["report", run_folder, "--out", tmp_path / "x.pdf"], "--out: "),
        (["report", run_folder, "--out", "/dev/null/x.html"], "--out: /dev/null"),
        (["watch", tmp_path / "missing"], f"{tmp_path / 'missing'}: no such folder"),
    ):
        result = run_gkd(arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom gkd.cli.main import main\nsys.argv = ['gkd', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'jinja2', 'matplotlib', 'numpy', 'gkd.monitor'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    for command in ("report", "watch"):
        assert "RUN" in check(run_python(["-c", code, command, "--help"])).stdout
    assert "report" in check(run_python(["-c", code, "--help"])).stdout


def test_a_report_needs_no_torch(run_folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from gkd.cli.main import main; main()"
    check(run_python(["-c", code, "report", run_folder, "--no-png"]))
    check(run_python(["-c", code, "watch", run_folder, "--once"]))


def test_watch_once(run_folder: Path) -> None:
    shown = check(run_gkd(["watch", run_folder, "--once"])).stdout
    assert shown.startswith("one  finished in ") and "\x1b" not in shown


def test_ctrl_c_ends_a_watch_well(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "half", 2, total_steps=9)
    command = [sys.executable, "-m", "gkd", "watch", str(folder), "--interval", "0.1"]
    # A shell starts background jobs with SIGINT ignored, and the child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 2/9")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
