"""A run seen from outside: whatever happens to its files, the view follows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import finish_run, make_record, make_run, write_json

from gkd.errors import RunFolderError
from gkd.monitor import JsonlSink
from gkd.report.watch import MetricsFollower, RunWatch, show_once, watch_run


def _console(*, terminal: bool = False, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, legacy_windows=False), file


def _append(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(make_record(step)) + "\n" for step in steps)


def _events(events: Sequence[Callable[[], object]]) -> Callable[[float], None]:
    """Instead of sleeping, what happens next; a test that waits for more fails instead of hanging."""
    left = iter(events)

    def sleep(seconds: float) -> None:
        event = next(left, None)
        assert event is not None, "still watching after the last event"
        event()

    return sleep


# ---- following ---------------------------------------------------------------------------------------------------


def test_a_file_may_appear_later_and_end_in_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == [] and follower.last == {}
    whole = json.dumps({"step": 0, "loss": 2.5, "text": "\u00e9"}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole + whole[:-4])
    assert [record["step"] for record in follower.poll()] == [0]
    assert follower.poll() == []
    with path.open("ab") as file:
        file.write(whole[-4:].replace(b"0", b"1") + b'not a record\n{"step": 2, "loss": null, "new": 1}\n')
    assert [record["step"] for record in follower.poll()] == [0, 2]
    assert follower.columns["loss"].tolist()[:2] == [2.5, 2.5]
    assert [len(column) for column in follower.columns.values()] == [3, 3, 2, 3], "text ends where it was last seen"
    follower.close()


def test_a_resume_drops_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 6, total_steps=9)
    follower = MetricsFollower(folder / "metrics.jsonl")
    assert len(follower.poll()) == 6
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.truncate_after(2)
    sink.log(3, {"loss": 1.0})
    assert [record["step"] for record in follower.poll()] == [0, 1, 2, 3]
    assert follower.steps == [0, 1, 2, 3]
    sink.close()
    follower.close()


def test_a_file_that_is_cut_removed_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    path.write_text('{"step": 0}\n{"step": 1}\n')
    follower.poll()
    os.truncate(path, 12)
    assert [record["step"] for record in follower.poll()] == [0]
    path.unlink()
    assert follower.poll() == [] and follower.steps == []
    path.write_text('{"step": 7}\n')
    assert [record["step"] for record in follower.poll()] == [7]
    path.unlink()
    path.write_text('{"step": 8}\n')  # as long as the old one; many file systems give it the old one's inode
    assert [record["step"] for record in follower.poll()] == [8]
    follower.close()


# ---- the view ----------------------------------------------------------------------------------------------------


def test_a_snapshot(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 12, total_steps=40)
    console, file = _console()
    show_once(folder, console)
    shown = file.getvalue()
    assert shown.startswith("run  running\nstep 12/40") and " 30%" in shown and "eta " in shown
    for label in ("loss", "forward KL", "tokens a second", "gradient norm", "sync weights", "latest"):
        assert label in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits(tmp_path: Path, width: int) -> None:
    folder = make_run(tmp_path / "run", 30)
    console, file = _console(width=width)
    show_once(folder, console)
    assert max(map(len, file.getvalue().splitlines())) <= min(width, 100)


def test_a_finished_run(tmp_path: Path) -> None:
    console, file = _console()
    show_once(make_run(tmp_path / "run", 20), console)
    shown = file.getvalue()
    assert "finished in " in shown and "eta" not in shown and "22.0 %" in shown and "after" in shown


def test_before_the_first_step(tmp_path: Path) -> None:
    console, file = _console()
    show_once(tmp_path, console)
    assert file.getvalue() == f"{tmp_path.name}  not started\nno step is recorded yet\n"
    with pytest.raises(RunFolderError, match="no such folder"):
        show_once(tmp_path / "missing", console)


def test_silence_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3, total_steps=9)
    written = (folder / "metrics.jsonl").stat().st_mtime
    states = [RunWatch(folder, clock=lambda age=age: written + age)._state()[0] for age in (1.0, 39.0, 90.0)]
    assert states == ["running", "running", "no new step for 1m30s"], "five steps of 8 s are not silence"


def test_a_name_is_plain_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2)
    config = json.loads((folder / "config.resolved.json").read_text())
    config["run"]["name"] = "[bold red]x[/]\x1b[2J"
    write_json(folder / "config.resolved.json", config)
    console, file = _console()
    show_once(folder, console)
    assert file.getvalue().startswith("[bold red]x[/][2J  ")


def test_damaged_files_do_not_end_the_watch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2, total_steps=4)
    for name in ("config.resolved.json", "summary.json", "before.json"):
        (folder / name).write_text("{")
    console, file = _console()
    show_once(folder, console)
    assert "2 steps" in file.getvalue()


# ---- watching ----------------------------------------------------------------------------------------------------


def test_off_a_terminal_a_new_step_is_a_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2, total_steps=5)
    console, file = _console(width=20)
    first = {"heldout/forward_kl": 8.0}
    events = [
        lambda: None,
        lambda: _append(folder, 2, 3),
        lambda: _append(folder, 4),
        lambda: finish_run(folder, "run", first),
    ]
    watch_run(folder, console, sleep=_events(events))
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["step 2/5", "step 3/5", "step 4/5", "step 5/5"]
    assert "loss " in lines[0] and "s/step" in lines[0] and "eta " in lines[0]
    assert lines[4].startswith("run  finished")


def test_the_file_may_be_missing_at_first(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    folder.mkdir()
    console, file = _console()

    def start() -> None:
        folder.rmdir()
        make_run(folder, 3)

    watch_run(folder, console, sleep=_events([lambda: None, start]))
    assert file.getvalue().startswith("step 1/3  loss")


def test_a_summary_of_fewer_steps_is_not_the_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    config = json.loads((folder / "config.resolved.json").read_text())
    config["run"]["steps"] = 4
    write_json(folder / "config.resolved.json", config)
    console, file = _console()
    events = [lambda: _append(folder, 3), lambda: finish_run(folder, "run", {"heldout/jsd": 0.6})]
    watch_run(folder, console, sleep=_events(events))
    assert "step 4/4" in file.getvalue()


def test_a_terminal_gets_a_view_and_its_cursor_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2, total_steps=3)
    console, file = _console(terminal=True)

    def end() -> None:
        _append(folder, 2)
        finish_run(folder, "run", {"heldout/jsd": 0.6})

    watch_run(folder, console, sleep=_events([end]))
    shown = file.getvalue()
    assert "\x1b[?25l" in shown and "\x1b[?25h" in shown and "3/3" in shown


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 2, total_steps=3)
    console, file = _console(terminal=True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_run(folder, console, sleep=_events([interrupt]))
    assert "\x1b[?25h" in file.getvalue()
