"""What a run says is to be done next can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gkd.config import make_config
from gkd.run_files import RunFiles
from gkd.train.result import summarise
from gkd.train.snapshots import Snapshot


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
