"""`read`: fields of a text, or a counted failure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from gkd.author.operators.base import Operator
from gkd.author.records import Drop, Record, RowState
from gkd.author.spec import ReadForm
from gkd.errors import ConfigError
from gkd.last_number import last_number
from gkd.time_limits import TooLongError, processor_time_limit

_LIMIT_S = 2.0  # for one text, which is read in microseconds: a regex may try every way to part it
_MOST_OBJECTS = 64  # places in a text where an object might begin
Reader = Callable[[str], Mapping[str, Any]]


class Read(Operator):
    def __init__(self, form: ReadForm, index: int, where: str) -> None:
        """Raises ConfigError for a regex that is none, or has no named group."""
        super().__init__(index, where)
        self._source = form.source
        self._read = _reader(form, where)
        self.needs = {form.source: f"{where}.from"}
        self.makes = form.written

    def of_record(self, record: Record, row: RowState) -> Record:
        text = record[self._source]
        try:
            with processor_time_limit(_LIMIT_S):
                found = self._read(text if isinstance(text, str) else json.dumps(text))
        except TooLongError:
            raise Drop(f"the text takes longer than {_LIMIT_S:g} s of processor time to be read") from None
        return {**record, **found}


def _reader(form: ReadForm, where: str) -> Reader:
    if form.regex is not None:
        return _of_regex(form.regex, f"{where}.regex")
    if form.number is not None:
        return _of_number(form.number)
    if form.json_keys is not None:
        keys = form.json_keys if isinstance(form.json_keys, dict) else {key: key for key in form.json_keys}
        return _of_json(keys)
    return _of_headings(form.headings or {})


def _of_regex(source: str, where: str) -> Reader:
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise ConfigError(f"{where}: {error}") from None
    if not pattern.groupindex:
        raise ConfigError(f"{where}: has no named group, and so no field; write (?P<name>...)")

    def read(text: str) -> Mapping[str, Any]:
        found = pattern.search(text)
        if found is None:
            raise Drop("the regex does not match", text)
        return {name: (value or "").strip() for name, value in found.groupdict().items()}

    return read


def _of_number(field: str) -> Reader:
    def read(text: str) -> Mapping[str, Any]:
        number = last_number(text)
        if number is None:
            raise Drop("no number in the text", text)
        return {field: number}

    return read


def _of_json(keys: Mapping[str, str]) -> Reader:
    def read(text: str) -> Mapping[str, Any]:
        value = first_object(text)
        if value is None:
            raise Drop("no JSON object in the text", text)
        for key in keys.values():
            if key not in value:
                raise Drop(f"the JSON object has no {key!r}", text)
        return {field: value[key] for field, key in keys.items()}

    return read


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object that stands in a text, in a fence or among words."""
    decoder, start = json.JSONDecoder(), -1
    for _ in range(_MOST_OBJECTS):
        start = text.find("{", start + 1)
        if start < 0:
            return None
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        return value
    return None


def _of_headings(headings: Mapping[str, str]) -> Reader:
    """A heading stands at the begin of a line, whatever marks are around it; its section ends at the next of them."""
    names = "|".join(re.escape(heading) for heading in sorted(headings.values(), key=len, reverse=True))
    pattern = re.compile(rf"^[\s#*_>\d.)-]*({names})\s*[*_]*\s*(?::|$)[*_]*", re.IGNORECASE | re.MULTILINE)

    def read(text: str) -> Mapping[str, Any]:
        places = list(pattern.finditer(text))
        ends = [place.start() for place in places[1:]] + [len(text)]
        sections: dict[str, str] = {}
        for place, end in zip(places, ends, strict=False):
            sections.setdefault(place[1].casefold(), text[place.end() : end].strip())
        for heading in headings.values():
            if not sections.get(heading.casefold()):
                raise Drop(f"no section {heading!r}", text)
        return {field: sections[heading.casefold()] for field, heading in headings.items()}

    return read
