"""Where rows come from: JSON lines, Parquet, a folder of the `datasets` library, or a hub name; each row as it stands.

Nothing heavy is imported before a source asks for it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gkd.errors import DataError, shown

if TYPE_CHECKING:
    from datasets import Dataset

JSON_SUFFIXES = (".jsonl", ".json")  # read without any library
_FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SourceKind = Literal["json", "parquet", "folder", "hub"]


def source_kind(path: str, key: str) -> SourceKind:
    """What `path` names. Raises DataError, starting with `key`, where that is nothing."""
    try:
        location = Path(path).expanduser()
        is_folder, is_file = location.is_dir(), location.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that there is not
        raise DataError(f"{key}: {shown(path)} cannot be a file here: {error}") from None
    if is_folder:
        return "folder"
    if is_file:
        return "parquet" if location.suffix == ".parquet" else "json"
    if location.suffix not in _FILE_SUFFIXES and _HUB_NAME.fullmatch(path):
        return "hub"
    raise DataError(f"{key}: no such file: {path!r}; give a JSONL or Parquet file, a datasets folder or a hub name")


def stream_objects(path: str, split: str, *, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, row) of every row of `path` with all of its columns, one at a time. Null means absent.

    Raises DataError, starting with file:line or with `key`, for what cannot be read or is no object.
    """
    for origin, value in _stream(path, split, key):
        if not isinstance(value, dict):
            raise DataError(f"{origin}: a row is an object, not {shown(value)}")
        yield origin, {str(name): item for name, item in value.items() if item is not None}


def _stream(path: str, split: str, key: str) -> Iterator[tuple[str, object]]:
    kind, location = source_kind(path, key), Path(path).expanduser()
    if kind == "json":
        yield from json_lines(location)
    elif kind == "parquet":
        with open_parquet(location) as file:
            yield from parquet_values(file, path, None)
    else:
        table = load_folder(location, split, key) if kind == "folder" else load_by_name(path, split, key)
        with explained(f"{path}: cannot be read"):
            for index, value in enumerate(table):
                yield f"{path}:{index}", dict(value)


# ---- files


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(origin, value) of each line that is not blank."""
    try:
        with path.open("rb") as file:  # bytes: only \n ends a line, and bad UTF-8 is known by its line
            for number, raw in enumerate(file, start=1):
                origin = f"{path}:{number}"
                line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, origin)
                if line.strip():
                    yield origin, _parse_json(line.rstrip("\r\n"), origin)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(raw: bytes, origin: str) -> str:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 at byte {error.start + 1} of the line") from None
    if "\0" in line:
        column = line.index("\0") + 1
        raise DataError(f"{origin}: NUL character at column {column}; the file must be UTF-8 text")
    return line


def _parse_json(line: str, origin: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        where = f"{origin}: bad JSON at column {error.colno}"
        raise DataError(f"{where}: {error.msg}; a line holds one object") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of brackets
        raise DataError(f"{origin}: bad JSON: {error}") from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # the last would win, and nobody knows whether it is the one that was meant
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"key {shown(names.most_common(1)[0][0])} stands twice")
    return value


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `ParquetFile`: without `datasets`, which would import for seconds and leave a copy in its cache."""
    import pyarrow.parquet

    with (
        explained(f"{path}: cannot be read as Parquet"),
        pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        yield file


def parquet_values(file: Any, path: str | Path, columns: list[str] | None) -> Iterator[tuple[str, object]]:
    """(origin, row) of each row; `columns` None: all of them."""
    index = 0
    for batch in file.iter_batches(columns=columns):
        for value in batch.to_pylist():
            yield f"{path}:{index}", value
            index += 1


@contextmanager
def explained(where: str) -> Iterator[None]:
    """A damaged file makes its readers raise whatever they meet first, decoding errors and KeyErrors included."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{where}: {_first_line(error)}") from None


# ---- the `datasets` library -------------------------------------------------------------------------------


def load_folder(folder: Path, split: str, key: str) -> Dataset:
    """A folder from `save_to_disk`, or one with data files."""
    import datasets

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return load_by_name(str(folder), split, key)
    with explained(f"{key}: cannot load the folder {str(folder)!r}"):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.Dataset):
        return loaded  # one table, whatever its split was called
    if split not in loaded:
        known = ", ".join(map(str, loaded))
        raise DataError(f"{key}_split: {str(folder)!r} has no split {split!r}; it has: {known}")
    return loaded[split]


def load_by_name(path: str, split: str, key: str) -> Dataset:
    import datasets

    absent = f"{path!r} is no file here, and split {split!r} of a data set of this name cannot be loaded"
    with explained(f"{key}: {absent}"):
        loaded = datasets.load_dataset(path, split=split)
    assert isinstance(loaded, datasets.Dataset)  # one split, not streamed
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
