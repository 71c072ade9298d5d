"""What is written appears whole or not at all; what JSON cannot hold is null."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gkd.files import finite, flatten, write_atomically, written_aside
from gkd.run_files import RunFiles, parse_record


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "summary.json"
    write_atomically(path, b"old")
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"old"]
    write_atomically(path, b"new")
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"new"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken") as raised:
        write_atomically(tmp_path / "taken", b"")
    assert raised.value.filename == str(tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_what_is_no_number_is_null_however_deep() -> None:
    assert finite({"a": math.nan, "b": [1.0, math.inf, {"c": -math.inf}], "d": "text", "e": 3}) == {
        "a": None,
        "b": [1.0, None, {"c": None}],
        "d": "text",
        "e": 3,
    }


def test_nested_mappings_are_flattened_and_other_values_kept() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1}', b'{"step": "0"}', b"\xff"])
def test_a_line_without_a_step_is_no_record(line: bytes) -> None:
    assert parse_record(line) is None
    assert parse_record(b'{"step": 0, "loss": 1.0}') == {"step": 0, "loss": 1.0}


def test_the_next_run_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    """A file that is added to a run's folder is replaced with it, or stands here."""
    files = RunFiles(tmp_path)
    replaced = files.of_one_run
    within = {path for path in vars(files).values() if path.parent in replaced}
    assert set(vars(files).values()) - set(replaced) - within == {files.path, files.marker, files.previous}
