"""What a stage is made of: its file, and the contents behind the names in it. A stage is done for one such set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkd.config import Config
from gkd.digests import digest, file_digest
from gkd.files import flatten
from gkd.train.run_folder import is_free_on_resume

STEPS = "run.steps"  # the one key that changes a result and that a resume may change
_NAMES = ("data.train", "data.heldout", "deepspeed.config", "student.model")


def config_inputs(config: Config) -> dict[str, Any]:
    """Config key -> value, but for keys that change nothing of what comes out; and `contents of KEY` -> digest, where
    the value names a file or folder of this machine."""
    values = flatten(config.model_dump(mode="json"))
    names = [*_NAMES, *(f"{config.teacher_key(name)}.model" for name in config.teachers)]
    kept = {key: value for key, value in values.items() if key == STEPS or not is_free_on_resume(key)}
    return kept | _contents_of({key: values[key] for key in names if values.get(key) is not None})


def recipe_inputs(recipe: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The same of a recipe, and of the files that it is given, by their keys."""
    names = {f"models.{name}.model": str(model["model"]) for name, model in recipe["models"].items()}
    for index, step in enumerate(recipe["steps"]):
        if step["sample"] is not None and step["sample"]["examples"] is not None:
            names[f"steps.{index}.sample.examples.file"] = step["sample"]["examples"]["file"]
    return {**flatten(recipe), **files} | _contents_of({**names, **files})


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _contents_of(names: Mapping[str, str]) -> dict[str, str]:
    found = {f"contents of {key}": _contents(name) for key, name in names.items()}
    return {key: contents for key, contents in found.items() if contents is not None}


def _contents(name: str) -> str | None:
    """None for what is no path here: a hub name, or a wheel's."""
    path = Path(name).expanduser()
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest("\n".join(f"{file.relative_to(path)}:{file_digest(file)}" for file in files).encode()).hex()
