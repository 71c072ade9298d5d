"""Checkpoints: written aside, sealed with a manifest of sizes and hashes, flushed to the disk, then renamed.

checkpoints/step_N/engine/...       DeepSpeed's files, one set a rank
checkpoints/step_N/sources_rank_R.json   what sources of the mixture remember, if any does
checkpoints/step_N/manifest.json    step, world size, ZeRO stage, and every file's size and SHA-256

DeepSpeed's files are pickles. They are loaded only from a folder whose manifest names every file and matches, which
proves that they are whole, and only as data (`gkd.train.unpickling`), whoever wrote them and the manifest.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from gkd.errors import CheckpointError, RunFolderError
from gkd.files import flush, flush_tree, write_json
from gkd.system_errors import writing_into
from gkd.train.distributed import barrier, from_main
from gkd.train.unpickling import check_is_data

_MANIFEST = "manifest.json"


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: int
    layout: dict[str, int]
    files: dict[str, _File]


class HasState(Protocol):
    def save_state(self, folder: str) -> None: ...

    def load_state(self, folder: str) -> None: ...


class States:
    """Several as one, in this order."""

    def __init__(self, *states: HasState) -> None:
        self._states = states

    def save_state(self, folder: str) -> None:
        for state in self._states:
            state.save_state(folder)

    def load_state(self, folder: str) -> None:
        for state in self._states:
            state.load_state(folder)


class Checkpointer:
    """Saves every `every` steps and after the last; keeps the `keep` newest. All methods are collective.

    `layout` is what a resume must not change: how many ranks there are, and what is sharded over them.
    """

    def __init__(
        self,
        folder: Path,
        state: HasState,
        *,
        every: int,
        last_step: int,
        keep: int,
        layout: Mapping[str, int],
        is_main: bool,
    ) -> None:
        self._folder = folder
        self._state = state
        self._every = every
        self._last_step = last_step
        self._keep = keep
        self._layout = dict(layout)
        self._is_main = is_main
        self._newest: int | None = None  # saved by this process

    def maybe_save(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self._every and (step % self._every == 0 or step == self._last_step):
            self.save(step)

    def save(self, step: int) -> Path:
        """Of the older ones, as many as are kept stay."""
        saved = self._write(step)
        if self._is_main:
            for old in saved_steps(self._folder)[: -self._keep]:
                shutil.rmtree(self._folder / f"step_{old}")
        return saved

    def save_beside(self, step: int) -> Path:
        """Beside all older ones: what is saved may be what a run fails from."""
        there = self._folder / f"step_{step}"
        return there if from_main(there.exists() if self._is_main else None) else self._write(step)

    def _write(self, step: int) -> Path:
        aside, final = self._folder / f".step_{step}.tmp", self._folder / f"step_{step}"
        if step == self._newest:
            return final
        try:
            self._write_aside(step, aside, final)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)  # of no use, and a full disk is not to stay full
            raise
        self._newest = step
        return final

    def _write_aside(self, step: int, aside: Path, final: Path) -> None:
        if self._is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        with writing_into(aside):
            self._state.save_state(str(aside))
        barrier()  # every rank's files are there
        if self._is_main:
            manifest = _Manifest(step=step, layout=self._layout, files=_describe_files(aside))
            write_json(aside / _MANIFEST, manifest.model_dump())
            flush_tree(aside)  # a renamed folder must not hold files that a power cut can still empty
            shutil.rmtree(final, ignore_errors=True)
            aside.replace(final)
            flush(self._folder)
            flush(self._folder.parent)  # which got this folder at the first save
        barrier()

    def load(self, step: int) -> None:
        """Puts the state of checkpoint `step`, which `find_resume_step` found, into the engine."""
        self._state.load_state(str(self._folder / f"step_{step}"))


def find_resume_step(folder: Path, layout: Mapping[str, int], note: Callable[[str], None] = lambda text: None) -> int:
    """The step of the newest undamaged checkpoint, or 0 if there is none. Reads every byte of it, loads nothing.

    Raises RunFolderError if it was saved under another `layout`, CheckpointError if every one is damaged, or if
    it holds more than data: that is no damage, but somebody's doing.
    """
    steps = saved_steps(folder)
    for step in reversed(steps):
        checkpoint = folder / f"step_{step}"
        fault = find_fault(checkpoint, layout)
        if fault is not None:
            note(f"checkpoint step_{step} is damaged ({fault}); trying the one before")
            continue
        saved = _read_manifest(checkpoint).layout
        differences = [f"{key} was {saved[key]}, is {value}" for key, value in layout.items() if saved[key] != value]
        if differences:
            raise RunFolderError(f"--resume: {checkpoint} does not fit: {'; '.join(differences)}")
        check_is_data(checkpoint)
        return step
    if steps:
        raise CheckpointError(f"{folder}: none of the {len(steps)} checkpoints is intact")
    return 0


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, oldest first."""
    names = [re.fullmatch(r"step_(\d+)", child.name) for child in folder.glob("step_*")]
    return sorted(int(match[1]) for match in names if match)


def find_fault(folder: Path, layout: Mapping[str, int]) -> str | None:
    """What is wrong with a checkpoint's files, or None. `layout`: whose keys its manifest has to have."""
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError):
        return f"{_MANIFEST} is missing or unreadable"
    if folder.name != f"step_{manifest.step}" or manifest.layout.keys() != layout.keys():
        return f"{_MANIFEST} is another's"
    expected = manifest.files
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {_MANIFEST}
    if found != expected.keys():
        return f"files differ from the manifest: {sorted(found ^ expected.keys())[0]}"
    for name, entry in expected.items():
        path = folder / name
        if path.stat().st_size != entry.bytes or _sha256(path) != entry.sha256:
            return f"{name} does not match its size and hash"
    return None


def _read_manifest(folder: Path) -> _Manifest:
    """Raises OSError or ValueError for one that is not whole."""
    return _Manifest.model_validate_json((folder / _MANIFEST).read_bytes())


def _describe_files(folder: Path) -> dict[str, _File]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): _File(bytes=p.stat().st_size, sha256=_sha256(p)) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
