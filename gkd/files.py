"""Files: JSON that a user names is read or refused in one line; what is written appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from gkd.errors import InputError


def read_json_object(path: Path, error: type[InputError], key: str = "") -> dict[str, Any]:
    """The object in a file. Raises `error`, starting with the config key if there is one, with file:line."""
    where = f"{key}: {path}" if key else f"{path}"
    values: Any
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{where}: {cause.strerror}") from None
    except UnicodeDecodeError as cause:
        raise error(f"{where}: {cause}") from None
    except json.JSONDecodeError as cause:
        raise error(f"{where}:{cause.lineno}: {cause.msg}") from None
    if not isinstance(values, dict):
        raise error(f"{where}:1: expected a JSON object")
    return cast("dict[str, Any]", values)


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Yields a hidden name beside `path` for a file that becomes `path` when the block ends without an error.

    A reader, or a crash, sees the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` in one step, and not before `content` is on the disk; returns when a power cut keeps it.

    Raises OSError that names `path`; the old file is then intact.
    """
    try:
        with written_aside(path) as aside, aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Returns when a power cut keeps a file's contents, or the names that a folder holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` of a folder and all that is in it: to be called before it gets the name that others go by."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            flush(path)


def write_json(path: Path, value: Any) -> None:
    """Indented, in one step: a reader never sees half a file."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))


def finite(value: Any) -> Any:
    """`value` with None for each float that is no number or infinite, in lists and mappings too.

    JSON has no way to write those that all readers accept.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in cast("dict[str, Any]", value).items()}
    return [finite(item) for item in cast("list[Any]", value)] if isinstance(value, list | tuple) else value


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(values, dict):
        return {path: values}
    flat: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", values).items():
        flat.update(flatten(value, f"{path}.{key}" if path else str(key)))
    return flat
