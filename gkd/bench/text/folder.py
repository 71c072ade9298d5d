"""Where the parts of a comparison lie on the disk, each named by a hash of what decides it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gkd.bench.kept import read_json, short_name
from gkd.bench.text.methods import Cell, Method
from gkd.bench.text.sizes import RESULTS_VERSION, Material, Size


@dataclass(frozen=True)
class Folder:
    """A part that exists is complete: all are written aside and renamed."""

    root: Path
    size: Size
    material: Material

    def _key(self, *parts: object) -> str:
        files = [path.read_text(encoding="utf-8") for path in (self.material.train, self.material.heldout)]
        return short_name(RESULTS_VERSION, self.material.teacher, files, self.size.deciding(), *parts)

    @property
    def key(self) -> str:
        """Of all that decides what runs have in common."""
        return self._key()

    @property
    def layers(self) -> Path:
        """Which layers the student is to have, where a record says it; else they are measured."""
        return self.root / f"layers-{self._key()}.json"

    def kept_layers(self) -> list[int] | None:
        """Those of the student, once they are known."""
        from gkd.models.subset import RECORD_FILE  # with transformers

        record = self.student / RECORD_FILE
        if record.exists():
            return read_json(record)["layers"]
        return read_json(self.layers) if self.layers.exists() else None

    @property
    def student(self) -> Path:
        """What all runs start from."""
        return self.root / f"student-{self._key()}"

    @property
    def teacher_texts(self) -> Path:
        """What the teacher writes for the held-out prompts, sampled and greedy."""
        return self.root / f"teacher-texts-{self._key()}.json"

    def result(self, cell: Cell) -> Path:
        return self.root / "cells" / f"{self._key(cell)}.json"

    def times(self, method: Method, round_index: int) -> Path:
        return self.root / "times" / f"{self._key(method, self.size.timed_steps, round_index)}.json"

    def text_times(self, round_index: int) -> Path:
        """How long the teacher's texts take."""
        return self.root / "times" / f"{self._key('texts', round_index)}.json"

    @property
    def scratch(self) -> Path:
        """The folder of the runs, which keep nothing there that matters."""
        return self.root / "run"
