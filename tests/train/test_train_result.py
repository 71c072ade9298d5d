"""What a run says is to be done next can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gkd.config import make_config
from gkd.errors import RunFolderError
from gkd.run_files import RunFiles
from gkd.train.result import summarise
from gkd.train.snapshots import Snapshot, read_snapshot


@pytest.mark.parametrize("name", ["run", "a b", "it's; rm -rf $HOME", 'say "hi" `id`'])
def test_next_commands_are_quoted(tmp_path: Path, name: str) -> None:
    config = make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}})
    files = RunFiles(tmp_path / name)
    nothing = Snapshot({}, [])
    summary = summarise(config, files, records=[], before=nothing, after=nothing, shown=[], wall_s=0.0)
    generate, evaluate, less, start = map(shlex.split, summary.next_commands)
    assert generate[1:3] == ["generate", str(files.final)] and generate[3] == "--prompt" and len(generate) == 5
    assert evaluate[1:] == ["eval", str(files.config), "--student", str(files.final)]
    assert less == ["less", str(files.samples)]
    assert start[1:] == ["init", "t", "your_prompts.jsonl", "--student", "your_student"]


@pytest.mark.fault
@pytest.mark.parametrize(("text", "why"), [(None, "No such file"), ("{", ":1: "), ('{"heldout": {}}', "other keys")])
def test_the_figures_before_training_are_gone(tmp_path: Path, text: str | None, why: str) -> None:
    """The message says how a resume goes on without them, and it does."""
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RunFolderError, match=r"before\.json:.*bring it back, or write ") as raised:
        read_snapshot(path)
    assert why in str(raised.value)
    path.write_text(str(raised.value).partition("or write ")[2].partition(" into it")[0])
    config = make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}})
    after = Snapshot({"heldout/forward_kl": 1.0}, ["an answer"])
    before = read_snapshot(path)
    summary = summarise(config, RunFiles(tmp_path), records=[], before=before, after=after, shown=[], wall_s=0.0)
    assert not summary.heldout and not summary.samples
