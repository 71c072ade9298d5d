"""Reading rows: TRL's formats from JSON lines, Parquet, a folder of the `datasets` library, or a hub name.

    {"prompt": "text"}                                raw text, tokenised as it stands
    {"prompt": [message, ...]}                        a conversation, rendered with the chat template
    {"prompt": ..., "completion": "text" | [message]} either, with the data set's own answer
    {"messages": [message, ...]}                      a last message of the assistant's is the completion
    {..., "teacher_messages": [message, ...]}         beside any of them: what the teacher reads in the prompt's place
    {..., "teacher_prompt": "text" | [message]}       the same, as raw text or as a conversation
    {..., "weight": 0.5}                              beside any of them: what the row weighs in the loss; 1 without
    {..., "task": {"answer": 84}}                     beside any of them: what an environment has to know of it
    {..., "task": "rationale"}                        without an environment: a name that splits the metrics

A message is {"role": ..., "content": "text"}. The first wrong row ends the reading, with its file and line.

The command line reads the data once before torch or transformers are loaded, so that a bad row costs a second
and not a model: nothing heavy is imported here, and `datasets` only where a folder or a hub name asks for it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.data.sources import explained, json_lines, load_by_name, load_folder, open_parquet, parquet_values, source_kind
from gkd.errors import DataError, shown

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "developer", "user", "assistant", "tool")
_VIEW_KEYS = ("teacher_messages", "teacher_prompt")
ROW_KEYS = ("prompt", "completion", "messages", "weight", "task", *_VIEW_KEYS)
_EXPECTED = 'expected {"prompt": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
_MOST_SHOWN = 8  # columns that one message names

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a conversation (`messages`) or raw text (`prompt_text`), and its own answer if it has one."""

    origin: str  # "file:line", or "path:row" with rows from 0 where there are no lines
    messages: tuple[Message, ...] | None = None
    prompt_text: str | None = None
    completion_messages: tuple[Message, ...] | None = None  # beside `messages`: one, of the assistant's
    completion_text: str | None = None  # beside `prompt_text`
    weight: float = 1.0  # of the row in the loss's numerator
    teacher: str | None = None  # what the teacher column says
    teacher_messages: tuple[Message, ...] | None = None  # what the teacher reads in the prompt's place
    teacher_prompt_text: str | None = None  # the same, of a row whose teacher reads raw text
    task: str | None = None  # JSON

    @property
    def has_view(self) -> bool:
        """Whether the row says what its teacher reads."""
        return self.teacher_messages is not None or self.teacher_prompt_text is not None


@dataclass(frozen=True, slots=True)
class RowTable:
    """The rows of a source, and what was not read of them."""

    rows: list[Row]  # in the source's order: a row's index is its number in the data
    ignored: Counter[str]  # columns that nothing reads -> in how many rows they stand

    def ignored_line(self, key: str) -> str | None:
        """What a user is told of `ignored`, once; None if there is nothing to tell."""
        if not self.ignored:
            return None
        named = [f"{name} ({rows} rows)" for name, rows in self.ignored.most_common(_MOST_SHOWN)]
        rest = len(self.ignored) - len(named)
        return f"{key}: columns that nothing reads: {', '.join(named)}" + (f" and {rest} more" if rest else "")


def read_rows(path: str, split: str, *, key: str = "data.train", teacher_column: str | None = None) -> list[Row]:
    """All rows of `path`, as `read_table` reads them."""
    return read_table(path, split, key=key, teacher_column=teacher_column).rows


def read_table(path: str, split: str, *, key: str = "data.train", teacher_column: str | None = None) -> RowTable:
    """All rows of `path`, in its order.

    `split` chooses from a `datasets` folder or a hub name. `key` is the config key that messages name. `teacher_column`
    names one more key that rows may have, with text. For all kinds of source alike: a column that is nobody's is
    counted and left out, one whose name is nearly that of a known one is an error, and `messages` says more than a
    `prompt` or `completion` beside it, which many hub tables have.
    Raises DataError, starting with file:line or with `key`, for anything that cannot be read or understood.
    """
    kind, location = source_kind(path, key), Path(path).expanduser()
    known = ROW_KEYS if teacher_column is None else (*ROW_KEYS, teacher_column)
    columns: Counter[str] = Counter()
    if kind == "json":
        values = json_lines(location)
    elif kind == "parquet":
        values = _parquet_rows(location, known, columns)
    else:
        table = load_folder(location, split, key) if kind == "folder" else load_by_name(path, split, key)
        values = _table_rows(table, path, known, columns)
    rows = [_parse_row(value, origin, known, columns) for origin, value in values]
    if not rows:
        raise DataError(f"{path}: no rows; {_EXPECTED}, one a line")
    if teacher_column is not None and not columns[teacher_column]:
        raise DataError(f"{path}: no column {teacher_column!r} (data.teacher_column); {_listed(columns)}")
    return RowTable(rows, Counter({name: rows for name, rows in columns.items() if name not in known}))


def parse_row(value: object, origin: str) -> Row:
    """One row as `read_table` reads it, without a teacher column. Raises DataError that starts with `origin`."""
    return _parse_row(value, origin, ROW_KEYS, Counter())


# ---- one row ----------------------------------------------------------------------------------------------


def _parse_row(value: object, origin: str, known: tuple[str, ...], columns: Counter[str]) -> Row:
    """Counts the row's columns in `columns`, too."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row is an object, not {_kind(value)}; {_EXPECTED}")
    for name in value:
        columns[name] += 1
        if name not in known:
            _check_is_nobodys(name, known, origin)
    row = {name: value[name] for name in known if value.get(name) is not None}  # null means absent, as in tables
    teacher = None if known == ROW_KEYS else row.pop(known[-1], None)
    if teacher is not None and not isinstance(teacher, str):
        raise DataError(f"{origin}: {known[-1]}: expected a teacher's name, not {_kind(teacher)}")
    if "messages" in row:
        columns.update(f"{name} beside messages" for name in ("prompt", "completion") if name in row)
    weight = _parse_weight(row.get("weight", 1.0), f"{origin}: weight")
    task = None if "task" not in row else _parse_task(row["task"], f"{origin}: task")
    return replace(_parse_texts(row, origin), weight=weight, teacher=teacher, task=task, **_parse_view(row, origin))


def _check_is_nobodys(name: str, known: tuple[str, ...], origin: str) -> None:
    """Raises DataError for a column whose name was probably meant to be one of `known`."""
    meant = near_miss(name, known)
    if meant is not None:
        raise DataError(f"{origin}: unknown key {shown(name)}; did you mean {meant!r}? Rename it, or remove it")


@functools.cache
def near_miss(name: str, known: tuple[str, ...]) -> str | None:
    """Which of `known` a name differs from by case, punctuation, or a letter or two; None if from all by more.

    `prompt_id` and `prompt_length` stand in many tables and are no slips of the pen.
    """
    plain = re.sub(r"[\W_]+", "", name).casefold()
    for candidate in known:
        allowed = 0 if len(candidate) < 5 else 1 if len(candidate) < 8 else 2
        if abs(len(plain) - len(candidate)) <= allowed:
            wanted = re.sub(r"[\W_]+", "", candidate).casefold()
            if _edits(plain, wanted) <= allowed:
                return candidate
    return None


def _edits(left: str, right: str) -> int:
    """Letters to insert, delete, replace or swap with the next to make one of the other (optimal string alignment)."""
    before, above = [], list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        row = [i]
        for j, b in enumerate(right, start=1):
            best = min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, above = above, row
    return above[-1]


def _parse_texts(row: dict[Any, Any], origin: str) -> Row:
    if "messages" in row:
        messages = _parse_messages(row["messages"], origin, "messages")
        if messages and messages[-1]["role"] == "assistant":
            return Row(origin, messages=messages[:-1], completion_messages=messages[-1:])
        return Row(origin, messages=messages)
    if "prompt" not in row:
        raise DataError(f"{origin}: neither 'prompt' nor 'messages'; {_EXPECTED}")
    return _parse_prompt_row(row["prompt"], row.get("completion"), origin)


def _parse_view(row: dict[Any, Any], origin: str) -> dict[str, Any]:
    """What the teacher reads, by the names of `Row`."""
    given = [name for name in _VIEW_KEYS if name in row]
    if len(given) > 1:
        raise DataError(f"{origin}: teacher_messages and teacher_prompt both say what the teacher reads; leave out one")
    for name in given:
        if name == "teacher_prompt" and isinstance(row[name], str):
            return {"teacher_prompt_text": _parse_text(row[name], f"{origin}: {name}")}
        messages = _parse_messages(row[name], origin, name)
        if not messages or messages[-1]["role"] == "assistant":
            what = "the last message is the assistant's" if messages else "no messages"
            raise DataError(
                f"{origin}: {name}: {what}; it stands in the prompt's place, before the completion that both read"
            )
        return {"teacher_messages": messages}
    return {}


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
        kinds = "text or a list of messages" if name.endswith("prompt") else "a list of messages"
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
        raise DataError(f"{where}: unknown key {shown(unknown[0])}; known: role, content")
    if message["role"] not in ROLES:
        raise DataError(f"{where}.role: {shown(message['role'])} is unknown; known: {', '.join(ROLES)}")
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


def _parse_weight(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: expected a number from 0 on, not {_kind(value)}")
    if not 0 <= value < math.inf:  # NaN is neither
        raise DataError(f"{where}: expected a number from 0 on, not {value}")
    return float(value)


def _parse_task(value: object, where: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:  # a table may hold dates
        raise DataError(f"{where}: is nothing that JSON holds: {error}") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# ---- tables -----------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, known: tuple[str, ...], columns: Counter[str]) -> Iterator[tuple[str, object]]:
    with open_parquet(path) as file:
        wanted = _wanted_columns(file.schema_arrow.names, str(path), known, file.metadata.num_rows, columns)
        yield from parquet_values(file, path, wanted)


def _table_rows(
    table: Dataset, path: str, known: tuple[str, ...], columns: Counter[str]
) -> Iterator[tuple[str, object]]:
    with explained(f"{path}: cannot be read"):
        table = table.select_columns(_wanted_columns(table.column_names, path, known, len(table), columns))
        table.data.validate(full=True)  # it lies in the file as it is: wrong offsets would be read beyond its end
        for index, value in enumerate(table):
            yield f"{path}:{index}", dict(value)


def _wanted_columns(names: list[str], path: str, known: tuple[str, ...], rows: int, columns: Counter[str]) -> list[str]:
    """Columns that are rows' keys. The others (ids, categories) are counted here: nobody edits a hub's table."""
    if len(set(names)) < len(names):
        raise DataError(f"{path}: column {shown(Counter(names).most_common(1)[0][0])} stands twice")
    for name in names:
        if name not in known:
            _check_is_nobodys(name, known, path)
            columns[name] += rows
    if not {"prompt", "messages"} & set(names):
        raise DataError(f"{path}: no column 'prompt' or 'messages'; {_listed(names)}")
    return [name for name in known if name in names]


def _listed(names: Collection[str]) -> str:
    rest = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"its columns: {', '.join(itertools.islice(names, _MOST_SHOWN))}{rest}"
