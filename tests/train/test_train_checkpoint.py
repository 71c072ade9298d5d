"""Checkpoints: complete or invisible, verified before a byte is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gkd.errors import CheckpointError, RunFolderError
from gkd.files import write_json
from gkd.models.folders import written_aside
from gkd.train.checkpoint import Checkpointer, find_fault, find_resume_step, saved_steps

LAYOUT = {"world_size": 1, "zero_stage": 0}


class FileState:
    """Saves one file, as an engine would several."""

    def __init__(self, fail: bool = False) -> None:
        self.value, self.fail = "a" * 1000, fail

    def save_state(self, folder: str) -> None:
        (Path(folder) / "engine").mkdir()
        (Path(folder) / "engine" / "state.bin").write_text(self.value)
        if self.fail:
            raise OSError("disk full")

    def load_state(self, folder: str) -> None:
        self.value = (Path(folder) / "engine" / "state.bin").read_text()


def checkpointer(folder: Path, state: FileState, every: int = 2, keep: int = 2) -> Checkpointer:
    return Checkpointer(folder, state, every=every, last_step=7, keep=keep, layout=LAYOUT, is_main=True)


def test_saves_when_due_and_keeps_the_newest(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path, FileState())
    for step in range(1, 8):
        saver.maybe_save(step)
    assert saved_steps(tmp_path) == [6, 7]
    assert find_resume_step(tmp_path, LAYOUT) == 7
    saver.load(7)


def test_off_by_default(tmp_path: Path) -> None:
    checkpointer(tmp_path, FileState(), every=0).maybe_save(7)
    assert saved_steps(tmp_path) == []
    assert find_resume_step(tmp_path, LAYOUT) == 0


@pytest.mark.fault
def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    checkpointer(tmp_path, FileState()).save(2)
    with pytest.raises(OSError, match="disk full"):
        checkpointer(tmp_path, FileState(fail=True)).save(4)
    assert find_resume_step(tmp_path, LAYOUT) == 2
    checkpointer(tmp_path, FileState()).save(4)  # what was left aside is in nobody's way
    assert find_resume_step(tmp_path, LAYOUT) == 4


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["flip", "cut", "extra", "no-manifest", "no-sha256", "no-layout", "renamed"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, fault: str) -> None:
    saver = checkpointer(tmp_path, FileState())
    saver.save(2)
    saver.save(4)
    damaged, manifest = tmp_path / "step_4" / "engine" / "state.bin", tmp_path / "step_4" / "manifest.json"
    if fault == "flip":
        damaged.write_text("b" + damaged.read_text()[1:])
    elif fault == "cut":
        damaged.write_text("a")
    elif fault == "extra":
        (tmp_path / "step_4" / "planted.pkl").write_text("x")
    elif fault == "no-manifest":
        manifest.unlink()
    elif fault == "no-sha256":
        manifest.write_text(manifest.read_text().replace("sha256", "sha257"))
    elif fault == "no-layout":
        manifest.write_text(manifest.read_text().replace("world_size", "world_sice"))
    else:
        manifest.write_bytes((tmp_path / "step_2" / "manifest.json").read_bytes())
    notes: list[str] = []
    assert find_fault(tmp_path / "step_4", LAYOUT) is not None
    assert find_resume_step(tmp_path, LAYOUT, notes.append) == 2
    assert len(notes) == 1 and "step_4 is damaged" in notes[0]


@pytest.mark.fault
def test_nothing_intact_is_an_error(tmp_path: Path) -> None:
    checkpointer(tmp_path, FileState()).save(2)
    (tmp_path / "step_2" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is intact"):
        find_resume_step(tmp_path, LAYOUT)


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    checkpointer(tmp_path, FileState()).save(2)
    with pytest.raises(RunFolderError, match="world_size was 1, is 2; zero_stage was 0, is 3"):
        find_resume_step(tmp_path, {"world_size": 2, "zero_stage": 3})


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    folder = checkpointer(tmp_path, FileState()).save(2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 2 and manifest["files"]["engine/state.bin"]["bytes"] == 1000


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were handed to fsync, and "rename" for each renaming, in order."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted_fsync(handle: int) -> None:
        seen.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def noted(move: Any) -> Any:
        return lambda path, target: (path.is_dir() and seen.append("rename"), move(path, target))[1]

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted(replace))
    monkeypatch.setattr(Path, "rename", noted(rename))
    return seen


@pytest.mark.fault
def test_a_power_cut_finds_all_of_a_checkpoint_or_none(tmp_path: Path, flushed: list[str]) -> None:
    """Every file that the manifest names, and every folder's names, are on the disk before the checkpoint has its."""
    run = tmp_path / "run"
    folder = checkpointer(run / "checkpoints", FileState()).save(2)
    aside = run / "checkpoints" / ".step_2.tmp"
    inside = {str(aside / path.relative_to(folder)) for path in (folder, *folder.rglob("*"))}
    assert inside == {str(aside / name) for name in ("", "engine", "engine/state.bin", "manifest.json")}
    renamed = flushed.index("rename")
    assert inside <= set(flushed[:renamed])
    assert {str(run / "checkpoints"), str(run)} <= set(flushed[renamed:])


@pytest.mark.fault
def test_a_power_cut_finds_all_of_a_model_or_none(tmp_path: Path, flushed: list[str]) -> None:
    with written_aside(tmp_path / "final") as partial:
        (partial / "adapter").mkdir()
        (partial / "adapter" / "weights").write_text("x")
    renamed = flushed.index("rename")
    assert {str(partial / name) for name in ("", "adapter", "adapter/weights")} <= set(flushed[:renamed])
    assert str(tmp_path) in flushed[renamed:]
    flushed.clear()
    write_json(tmp_path / "inputs.json", {})
    assert flushed[-1] == str(tmp_path), "the file's new name too"
