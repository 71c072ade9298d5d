"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gkd.models.folders import copy_side_files, written_aside

KILLED_HALFWAY = """
import os, signal, sys
from pathlib import Path
from gkd.models.folders import written_aside
with written_aside(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write(target: Path, content: str, *, replace: bool = False) -> None:
    with written_aside(target, replace=replace) as folder:
        (folder / "file").write_text(content)


def test_nothing_shows_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with written_aside(target) as folder:
        (folder / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole"
    assert _names(target.parent) == ["model"]


def test_an_error_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _write(target, "old")
    with pytest.raises(KeyError), written_aside(target, replace=True) as folder:
        (folder / "file").write_text("new")
        raise KeyError
    assert (target / "file").read_text() == "old"
    assert _names(tmp_path) == ["model"]


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_writers_one_whole_folder_stays(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "model"
    with written_aside(target, replace=replace) as folder:
        (folder / "file").write_text("slower")
        _write(target, "faster")
    assert (target / "file").read_text() == ("slower" if replace else "faster")
    assert _names(tmp_path) == ["model"]


@pytest.mark.fault
def test_a_killed_writer_is_in_nobodys_way(tmp_path: Path) -> None:
    target = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", KILLED_HALFWAY, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    (litter,) = tmp_path.iterdir()
    _write(target, "whole")
    assert _names(target) == ["file"]
    assert litter.exists()  # its writer could still be alive

    day_before_yesterday = time.time() - 2 * 24 * 3600
    for path in (*litter.iterdir(), litter):
        os.utime(path, (day_before_yesterday, day_before_yesterday))
    _write(target, "again", replace=True)
    assert _names(tmp_path) == ["model"]


def test_side_files_are_neither_weights_nor_code(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json"]
    for name in (*kept, "config.json", "model.safetensors", "modeling_x.py", "tokenizer_x.py", "README.md"):
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert _names(target) == kept
