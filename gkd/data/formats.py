"""Reading rows: TRL's formats from JSON lines, Parquet, a folder of the `datasets` library, or a hub name.

    {"prompt": "text"}                                raw text, tokenised as it stands
    {"prompt": [message, ...]}                        a conversation, rendered with the chat template
    {"prompt": ..., "completion": "text" | [message]} either, with the data set's own answer
    {"messages": [message, ...]}                      a last message of the assistant's is the completion

A message is {"role": ..., "content": "text"}. The first wrong row ends the reading, with its file and line.

The command line reads the data once before torch or transformers are loaded, so that a bad row costs a second
and not a model: nothing heavy is imported here, and `datasets` only where a folder or a hub name asks for it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "developer", "user", "assistant", "tool")
ROW_KEYS = ("prompt", "completion", "messages")
_EXPECTED = 'expected {"prompt": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
JSON_SUFFIXES = (".jsonl", ".json")  # read without any library
_FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a conversation (`messages`) or raw text (`prompt_text`), and its own answer if it has one."""

    origin: str  # "file:line", or "path:row" with rows from 0 where there are no lines
    messages: tuple[Message, ...] | None = None
    prompt_text: str | None = None
    completion_messages: tuple[Message, ...] | None = None  # beside `messages`: one, of the assistant's
    completion_text: str | None = None  # beside `prompt_text`
    teacher: str | None = None  # what the teacher column says


def read_rows(path: str, split: str, *, key: str = "data.train", teacher_column: str | None = None) -> list[Row]:
    """All rows of `path`, in its order, so that a row's index is its number in the data.

    `split` chooses from a `datasets` folder or a hub name. `key` is the config key that messages name. `teacher_column`
    names one more key that rows may have, with text.
    Raises DataError, starting with file:line or with `key`, for anything that cannot be read or understood.
    """
    location = Path(path).expanduser()
    if location.is_dir():
        values = _table_rows(_load_folder(location, split, key), path, teacher_column)
    elif location.is_file():
        values = _parquet_rows(location, teacher_column) if location.suffix == ".parquet" else _json_lines(location)
    elif location.suffix not in _FILE_SUFFIXES and _HUB_NAME.fullmatch(path):
        values = _table_rows(_load_by_name(path, split, key), path, teacher_column)
    else:
        raise DataError(f"{key}: no such file: {path!r}; give a JSONL or Parquet file, a datasets folder or a hub name")
    rows = [_parse_row(value, origin, teacher_column) for origin, value in values]
    if not rows:
        raise DataError(f"{path}: no rows; {_EXPECTED}, one a line")
    return rows


# ---- one row ----------------------------------------------------------------------------------------------


def _parse_row(value: object, origin: str, teacher_column: str | None) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row is an object, not {_kind(value)}; {_EXPECTED}")
    row = {name: item for name, item in value.items() if item is not None}  # null means absent, as in tables
    teacher = None if teacher_column is None else row.pop(teacher_column, None)
    known = _row_keys(teacher_column)
    unknown = [str(name) for name in value if name not in known]
    if unknown:
        raise DataError(f"{origin}: unknown key {_listed(unknown)}; known: {', '.join(known)}")
    if teacher is not None and not isinstance(teacher, str):
        raise DataError(f"{origin}: {teacher_column}: expected a teacher's name, not {_kind(teacher)}")
    return replace(_parse_texts(row, origin), teacher=teacher)


def _row_keys(teacher_column: str | None) -> tuple[str, ...]:
    return ROW_KEYS if teacher_column is None else (*ROW_KEYS, teacher_column)


def _parse_texts(row: dict[Any, Any], origin: str) -> Row:
    if "messages" in row:
        if len(row) > 1:
            raise DataError(f"{origin}: 'messages' stands beside 'prompt' or 'completion'; {_EXPECTED}")
        messages = _parse_messages(row["messages"], origin, "messages")
        if messages and messages[-1]["role"] == "assistant":
            return Row(origin, messages=messages[:-1], completion_messages=messages[-1:])
        return Row(origin, messages=messages)
    if "prompt" not in row:
        raise DataError(f"{origin}: neither 'prompt' nor 'messages'; {_EXPECTED}")
    return _parse_prompt_row(row["prompt"], row.get("completion"), origin)


def _parse_prompt_row(prompt: object, completion: object, origin: str) -> Row:
    if isinstance(prompt, str):
        if completion is not None and not isinstance(completion, str):
            raise DataError(f"{origin}: completion: must be text like the prompt, not {_kind(completion)}")
        text = None if completion is None else _parse_text(completion, f"{origin}: completion")
        return Row(origin, prompt_text=_parse_text(prompt, f"{origin}: prompt"), completion_text=text)
    messages = _parse_messages(prompt, origin, "prompt")
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(f"{origin}: prompt: the last message is the assistant's; move it to 'completion'")
    if completion is None:
        return Row(origin, messages=messages)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer = _parse_messages(completion, origin, "completion")
    if [message["role"] for message in answer] != ["assistant"]:
        raise DataError(f"{origin}: completion: expected one message, of the assistant's")
    return Row(origin, messages=messages, completion_messages=answer)


def _parse_messages(value: object, origin: str, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        kinds = "text or a list of messages" if name == "prompt" else "a list of messages"
        raise DataError(f"{origin}: {name}: expected {kinds}, not {_kind(value)}")
    return tuple(_parse_message(item, f"{origin}: {name}[{i}]") for i, item in enumerate(value))


def _parse_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a message is an object with 'role' and 'content', not {_kind(value)}")
    message: dict[Any, Any] = {name: item for name, item in value.items() if item is not None}
    for name in ("role", "content"):
        if name not in message:
            raise DataError(f"{where}: no {name!r}")
    unknown = [str(name) for name in message if name not in ("role", "content")]
    if unknown:
        raise DataError(f"{where}: unknown key {_listed(unknown)}; known: role, content")
    if message["role"] not in ROLES:
        raise DataError(f"{where}.role: {message['role']!r} is unknown; known: {', '.join(ROLES)}")
    return {"role": message["role"], "content": _parse_text(message["content"], f"{where}.content")}


def _parse_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, not {_kind(value)}")
    if "\0" in value:
        raise DataError(f"{where}: holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise DataError(f"{where}: holds half a surrogate pair at character {error.start}") from None
    return value


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# ---- files ------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
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
        return json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{origin}: bad JSON at column {error.colno}"
        raise DataError(f"{where}: {error.msg}; a line holds one object") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of brackets
        raise DataError(f"{origin}: bad JSON: {error}") from None


def _parquet_rows(path: Path, teacher_column: str | None) -> Iterator[tuple[str, object]]:
    """Read without `datasets`, which would import for seconds and leave a copy in its cache."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _known_columns(file.schema_arrow.names, str(path), teacher_column)
            index = 0
            for batch in file.iter_batches(columns=columns):
                for value in batch.to_pylist():
                    yield f"{path}:{index}", _without_spare_columns(value)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None


def _table_rows(table: Dataset, path: str, teacher_column: str | None) -> Iterator[tuple[str, object]]:
    columns = _known_columns(table.column_names, path, teacher_column)
    for index, value in enumerate(table.select_columns(columns)):
        yield f"{path}:{index}", _without_spare_columns(dict(value))


def _known_columns(names: list[str], path: str, teacher_column: str | None) -> list[str]:
    """Columns that are rows' keys. Others (ids, categories) are left alone: nobody edits a hub's table."""
    columns = [name for name in _row_keys(teacher_column) if name in names]
    if not {"prompt", "messages"} & set(columns):
        raise DataError(f"{path}: no column 'prompt' or 'messages'; its columns: {', '.join(names)}")
    if teacher_column is not None and teacher_column not in names:
        raise DataError(f"{path}: no column {teacher_column!r} (data.teacher_column); its columns: {', '.join(names)}")
    return columns


def _without_spare_columns(value: dict[str, Any]) -> dict[str, Any]:
    """Many hub tables repeat the first message as a column 'prompt': 'messages' says more."""
    if value.get("messages") is None:
        return value
    return {name: item for name, item in value.items() if name not in ("prompt", "completion")}


# ---- the `datasets` library -------------------------------------------------------------------------------


def _load_folder(folder: Path, split: str, key: str) -> Dataset:
    """A folder from `save_to_disk`, or one with data files."""
    import datasets
    from datasets.exceptions import DatasetsError

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _load_by_name(str(folder), split, key)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{key}: cannot load the folder {str(folder)!r}: {_first_line(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        return loaded  # one table, whatever its split was called
    if split not in loaded:
        known = ", ".join(map(str, loaded))
        raise DataError(f"{key}_split: {str(folder)!r} has no split {split!r}; it has: {known}")
    return loaded[split]


def _load_by_name(path: str, split: str, key: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{key}: {path!r} is no file here, and split {split!r} of a data set of this name cannot be "
            f"loaded: {_first_line(error)}"
        ) from None
    assert isinstance(loaded, datasets.Dataset)  # one split, not streamed
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
