"""What a stage may be: a training, an evaluation, or data that a model writes. Each kind, once."""

from __future__ import annotations

import json
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gkd.author import Recipe
from gkd.chain.inputs import STEPS, config_inputs, recipe_inputs
from gkd.config import Config, load_config
from gkd.errors import ConfigError
from gkd.run_files import RunFiles

Action = Literal["skip", "resume", "start", "start anew"]
KindName = Literal["train", "eval", "author"]
Brought = Literal["student", "rows"]
_GKD = (sys.executable, "-m", "gkd")


@dataclass(frozen=True)
class Task:
    """A stage whose references are known. `words`: its overrides, key=value; `data` and `heldout`: of an author."""

    file: str
    words: Sequence[str]
    folder: Path
    launcher: str | None
    data: str | None = None
    heldout: str | None = None


class Kind(ABC):
    """One kind of stage. `brings` is what a reference to it stands for: a student, rows, or nothing."""

    name: ClassVar[KindName]
    brings: ClassVar[Brought | None] = None
    file_of_stage: ClassVar[bool] = False  # its file may be an earlier stage's config
    has_data: ClassVar[bool] = False  # it is given rows

    @abstractmethod
    def output(self, folder: Path) -> Path:
        """Its result; where it brings something, that."""

    @abstractmethod
    def check(self, task: Task) -> None:
        """Raises InputError for what can be found wrong before a stage has run."""

    @abstractmethod
    def inputs(self, task: Task) -> dict[str, Any]:
        """What it is made of: it is done for one such set."""

    def is_there(self, folder: Path) -> bool:
        """Whether its result is."""
        return self.output(folder).exists()

    @abstractmethod
    def decide(self, folder: Path, *, has_begun: bool, changed: Sequence[str]) -> Action:
        """What is to be done where the result is not there, or not of these inputs."""

    @abstractmethod
    def command(self, task: Task, action: Action) -> list[str]: ...


class OfConfig(Kind):
    """Its file is a config."""

    def check(self, task: Task) -> None:
        _config(task)

    def inputs(self, task: Task) -> dict[str, Any]:
        return config_inputs(_config(task))


class Train(OfConfig):
    name = "train"
    brings = "student"

    def output(self, folder: Path) -> Path:
        return RunFiles(folder).final

    def decide(self, folder: Path, *, has_begun: bool, changed: Sequence[str]) -> Action:
        files = RunFiles(folder)
        if not files.config.exists():
            return "start"
        if has_begun and set(changed) <= {STEPS} and any(files.checkpoints.glob("step_*")):
            return "resume"
        return "start anew"

    def command(self, task: Task, action: Action) -> list[str]:
        words = [self.name, task.file, *task.words, f"run.dir={json.dumps(str(task.folder))}"]
        words += {"resume": ["--resume"], "start anew": ["--overwrite"]}.get(action, [])
        if task.launcher is None:
            return [*_GKD, *words]
        return [*_GKD, "launch", "--", *shlex.split(task.launcher), "gkd", *words]


class Evaluate(OfConfig):
    name = "eval"
    file_of_stage = True

    def output(self, folder: Path) -> Path:
        return RunFiles(folder).evaluation

    def decide(self, folder: Path, *, has_begun: bool, changed: Sequence[str]) -> Action:
        return "start"

    def command(self, task: Task, action: Action) -> list[str]:
        return [*_GKD, self.name, task.file, *task.words, "--out", str(task.folder)]


class Author(Kind):
    """Its answers are kept by what was asked: what it starts anew it asks again only where the question is new."""

    name = "author"
    brings = "rows"
    has_data = True

    def output(self, folder: Path) -> Path:
        return folder / "rows.jsonl"

    def check(self, task: Task) -> None:
        Recipe.read(Path(task.file), task.words)

    def inputs(self, task: Task) -> dict[str, Any]:
        form = Recipe.read(Path(task.file), task.words).form
        named = {"data": task.data, "heldout": task.heldout}
        return recipe_inputs(form.model_dump(mode="json"), {k: v for k, v in named.items() if v is not None})

    def decide(self, folder: Path, *, has_begun: bool, changed: Sequence[str]) -> Action:
        return "start anew" if self.is_there(folder) else "start"

    def command(self, task: Task, action: Action) -> list[str]:
        task.folder.mkdir(parents=True, exist_ok=True)
        if action == "start anew":
            _move_to_previous(task.folder)
        heldout = [] if task.heldout is None else ["--heldout", task.heldout]
        out = str(self.output(task.folder))
        return [*_GKD, self.name, task.file, *task.words, "--data", str(task.data), *heldout, "--out", out]


KINDS: Mapping[KindName, Kind] = {kind.name: kind for kind in (Train(), Evaluate(), Author())}


def _config(task: Task) -> Config:
    return load_config(task.file, task.words)


def _move_to_previous(folder: Path) -> None:
    """What a stage has written, in place of what was moved there before."""
    previous = folder / "previous"
    previous.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file != previous:
            file.replace(previous / file.name)


def brought_for(key: str) -> Brought | None:
    """What a reference has to stand for that is the value of a key; None where that may be anything."""
    if key == "data" or key.startswith("data."):
        return "rows"
    return "student" if key.endswith(".model") else None


def check_data(kind: Kind, data: object, heldout: object, where: str) -> None:
    """Raises ConfigError for rows that are missing, or that nobody reads."""
    if kind.has_data and data is None:
        raise ConfigError(f"{where}.data: is missing: the rows that gkd author starts from, a file or {{stage: NAME}}")
    for key, value in (("data", data), ("heldout", heldout)):
        if not kind.has_data and value is not None:
            raise ConfigError(f"{where}.{key}: is for run: author; the config of a {kind.name} names its data")
