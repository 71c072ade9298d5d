"""A chain's file: its stages in the order in which they run, rounds written out, every reference to an earlier one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gkd.chain.kinds import KINDS, Brought, Kind, KindName, Task, brought_for, check_data
from gkd.config import make_section, read_mapping
from gkd.errors import ConfigError, shown
from gkd.schema import Section, is_mapping

_ROUND = "{{round}}"
_A: Mapping[Brought, str] = {"student": "a model", "rows": "rows"}
_NAME = r"[A-Za-z0-9][\w.-]{0,99}"


class ReferenceForm(Section):
    stage: str = Field(
        description="an earlier stage's name: its student or rows, or, as the file of an eval, its config"
    )
    round: Literal["previous"] | None = Field(None, description="of a repeat: the newest one before this round")
    first: str | None = Field(None, description="with round: what stands for it in a first round that has none")


class StageForm(Section):
    name: str = Field(description="names its folder in the chain's")
    run: KindName = Field("train", description="which command")
    file: str | ReferenceForm = Field(
        description="the command's config, or an author's recipe; of an eval also {stage: NAME}"
    )
    data: str | ReferenceForm | None = Field(None, description="run: author: the rows that it starts from")
    heldout: str | None = Field(None, description="run: author: texts that no row may share a run of words with")
    overrides: dict[str, Any] = Field({}, description="config keys, dotted or nested, and their values")
    launcher: str | None = Field(None, description="words before `gkd train`, such as `torchrun --nproc_per_node 2 -m`")


class RepeatForm(Section):
    repeat: int = Field(ge=1, le=1000, description="how many rounds")
    stages: list[dict[str, Any]] = Field(min_length=1, description="the stages of a round")


class ChainForm(Section):
    name: str = Field("chain", description="its folder is runs/<name> unless dir is set")
    dir: str | None = Field(None, description="folder of the chain: one folder a stage, and a report of all")
    launcher: str | None = Field(None, description="of every stage that has none of its own")
    stages: list[dict[str, Any]] = Field(min_length=1, description="stages, and repeats of stages")


@dataclass(frozen=True)
class Reference:
    """To what an earlier stage, by its full name, brings."""

    stage: str


@dataclass(frozen=True)
class Stage:
    """A command to run. `overrides` are key -> value, or the Reference whose output is the value."""

    name: str  # the round's number included
    kind: Kind
    file: str | Reference
    overrides: Mapping[str, Any]
    launcher: str | None
    folder: Path
    data: str | Reference | None = None
    heldout: str | None = None

    @property
    def needs(self) -> list[str]:
        """The stages that have to be done before it, by their full names."""
        values = [self.file, self.data, *self.overrides.values()]
        return list(dict.fromkeys(value.stage for value in values if isinstance(value, Reference)))

    def task(self, file: str, output: Callable[[Reference], str]) -> Task:
        """With what `output` says for each reference, and `file` for its own."""
        words = [
            f"{key}={json.dumps(output(value) if isinstance(value, Reference) else value)}"
            for key, value in self.overrides.items()
        ]
        data = output(self.data) if isinstance(self.data, Reference) else self.data
        return Task(file, words, self.folder, self.launcher, data, self.heldout)


@dataclass(frozen=True)
class Chain:
    name: str
    folder: Path
    stages: Sequence[Stage]

    def stage(self, name: str) -> Stage:
        """By its full name."""
        return next(stage for stage in self.stages if stage.name == name)


def read_chain(path: Path) -> Chain:
    """Raises ConfigError, which names the stage and the key, for whatever can be found wrong before a stage has run:
    the configs of all stages are read too."""
    form = make_section(ChainForm, read_mapping(path, "'stages:'"), str(path))
    _check_name(form.name, f"{path}: name")
    folder = Path(form.dir) if form.dir is not None else Path("runs") / form.name
    stages: list[Stage] = []
    written: list[str] = []  # the stages' names as they stand in the file
    for place in _places(form, str(path)):
        stage = _make_stage(place, written, stages, form.launcher, folder)
        stages.append(stage)
        written.append(place.form.name)
    return Chain(form.name, folder, stages)


# ---- from forms to stages


@dataclass(frozen=True)
class _Place:
    """A stage's form, where it stands in the file, and, in a repeat, the round and how many stages came before it."""

    form: StageForm
    where: str
    round: int | None = None
    before_round: int = 0


def _places(form: ChainForm, origin: str) -> Iterator[_Place]:
    count = 0
    for index, values in enumerate(form.stages):
        where = f"{origin}: stages.{index}"
        if "repeat" not in values:
            yield _Place(make_section(StageForm, values, where), where)
            count += 1
            continue
        repeat = make_section(RepeatForm, values, where)
        forms = [
            (make_section(StageForm, inner, f"{where}.stages.{number}"), f"{where}.stages.{number}")
            for number, inner in enumerate(repeat.stages)
        ]
        for number in range(1, repeat.repeat + 1):
            yield from (_Place(inner, at, number, count) for inner, at in forms)
            count += len(forms)


def _make_stage(
    place: _Place, written: Sequence[str], stages: Sequence[Stage], launcher: str | None, folder: Path
) -> Stage:
    form, where = place.form, place.where
    name = _in_round(form.name, place.round)
    if place.round is not None and name == form.name:
        name = f"{name}_{place.round}"
    _check_name(name, f"{where}.name")
    if any(stage.name == name for stage in stages):
        raise ConfigError(f"{where}.name: another stage is called {name!r} already")

    def resolved(value: Any, key: str) -> Any:
        if is_mapping(value) and "stage" in value:
            value = make_section(ReferenceForm, value, f"{where}.{key}")
        if isinstance(value, ReferenceForm):
            return _resolve(value, place, written, stages, key)
        if value == _ROUND and place.round is not None:
            return place.round
        return _in_round(value, place.round) if isinstance(value, str) else value

    stage = Stage(
        name=name,
        kind=KINDS[form.run],
        file=resolved(form.file, "file"),
        overrides={key: resolved(value, f"overrides.{key}") for key, value in _flat(form.overrides).items()},
        launcher=form.launcher or launcher,
        folder=folder / name,
        data=resolved(form.data, "data"),
        heldout=resolved(form.heldout, "heldout"),
    )
    check_data(stage.kind, stage.data, stage.heldout, where)
    _check(stage, stages, where)
    return stage


def _flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys; a reference stays whole."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if is_mapping(value) and "stage" not in value:
            flat |= {f"{key}.{inner}": deep for inner, deep in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _resolve(
    reference: ReferenceForm, place: _Place, written: Sequence[str], stages: Sequence[Stage], key: str
) -> Reference | str:
    if (reference.first is not None or reference.round) and place.round is None:
        raise ConfigError(f"{place.where}.{key}: round and first are for stages of a repeat")
    earlier = written[: place.before_round] if reference.round else written
    found = next((index for index in reversed(range(len(earlier))) if earlier[index] == reference.stage), None)
    if found is not None:
        return Reference(stages[found].name)
    if reference.round and reference.first is not None:
        return reference.first
    names = ", ".join(dict.fromkeys(earlier)) or "none"
    hint = "; give the first round something with first:" if reference.round else ""
    where = f"{place.where}.{key}"
    raise ConfigError(f"{where}: no stage before it is called {reference.stage!r} (there are: {names}){hint}")


def _in_round(text: str, number: int | None) -> str:
    return text if number is None else text.replace(_ROUND, str(number))


# ---- checks


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(_NAME, name):
        raise ConfigError(f"{where}: {shown(name)} must be letters, digits, '_', '-' and '.', as it names a folder")


def _check(stage: Stage, earlier: Sequence[Stage], where: str) -> None:
    by_name = {other.name: other for other in earlier}
    values = {"data": stage.data, **{f"overrides.{key}": value for key, value in stage.overrides.items()}}
    for key, value in values.items():
        if isinstance(value, Reference):
            _check_brings(by_name[value.stage], key, where)
    if isinstance(stage.file, Reference):
        if not stage.kind.file_of_stage:
            raise ConfigError(
                f"{where}.file: where run is {stage.kind.name} it is a file; {{stage: ...}} is for an eval"
            )
        if by_name[stage.file.stage].kind.name != "train":
            raise ConfigError(f"{where}.file: {stage.file.stage} is no train, and has no config to go by")
        return  # its config is checked already
    if "run.dir" in stage.overrides:
        raise ConfigError(f"{where}.overrides: run.dir is {stage.folder}, as this is the folder of the stage")
    task = stage.task(stage.file, lambda reference: str(by_name[reference.stage].folder))
    try:
        stage.kind.check(task)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_brings(stage: Stage, key: str, where: str) -> None:
    brings, wanted = stage.kind.brings, brought_for(key.removeprefix("overrides."))
    if brings is None:
        raise ConfigError(f"{where}.{key}: {stage.name} is an {stage.kind.name}, which makes nothing to go on with")
    if wanted is not None and wanted != brings:
        raise ConfigError(f"{where}.{key}: has to be {_A[wanted]}, and {stage.name} brings {_A[brings]}")
