"""A recipe made ready: its operators, and whether the input's rows have what they read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd.author.authors.kept import KeptAuthor
from gkd.author.operators import Ask, Operator, make_operator
from gkd.author.prompts import Prompt
from gkd.author.records import Record
from gkd.author.spec import RecipeForm, read_recipe
from gkd.author.templates import RenderError
from gkd.data.sources import stream_objects
from gkd.errors import ConfigError, DataError, shown

_MOST_SHOWN = 8  # columns that one message names


@dataclass(frozen=True)
class Recipe:
    origin: str  # its file
    form: RecipeForm
    operators: Sequence[Operator]
    columns: Mapping[str, str]  # that a row of the input has to have -> the key that reads them first

    @classmethod
    def read(cls, path: Path, overrides: Iterable[str] = ()) -> Recipe:
        """Raises InputError, which names file and key, for whatever can be found wrong without the input."""
        form = read_recipe(path, overrides)
        operators = [make_operator(step, index, str(path), form.seed) for index, step in enumerate(form.steps)]
        made: set[str] = set()
        columns: dict[str, str] = {}
        for operator in operators:
            for name, where in operator.needs.items():
                if name not in made:
                    columns.setdefault(name, where)
            made |= set(operator.makes)
        return cls(str(path), form, operators, columns)

    def use(self, authors: Mapping[str, KeptAuthor]) -> None:
        """Raises ConfigError for a model that cannot be asked as a step, or a checked row, asks."""
        for operator in self.operators:
            if isinstance(operator, Ask):
                operator.use(authors)

    def check_rows(self, data: str, split: str) -> int:
        """Reads the whole input; how many rows there are. Raises DataError, with file:line, for one that lacks what a
        step reads, and ConfigError for a field that would hide a column."""
        count = 0
        for origin, record in stream_objects(data, split, key="--data"):
            if count == 0:
                self._check_fields(record)
            for name, where in self.columns.items():
                if name not in record:
                    raise DataError(f"{origin}: no column {shown(name)}, which {where} reads; {_listed(record, name)}")
            for operator in self.operators:
                operator.check_row(record, origin)
            count += 1
        if not count:
            raise DataError(f"{data}: no rows")
        return count

    def _check_fields(self, record: Record) -> None:
        for operator in self.operators:
            for name in operator.makes:
                if name in record:
                    raise ConfigError(
                        f"{operator.where}: its field {name!r} has the name of a column of the data; give it another"
                    )

    def first_question(self, data: str, split: str) -> Prompt | None:
        """Of the first step about the first row, where the first step asks one. Raises DataError where it cannot be
        rendered."""
        first = self.operators[0]
        if not isinstance(first, Ask):
            return None
        origin, record = next(stream_objects(data, split, key="--data"))
        try:
            return first.first_question(record)
        except RenderError as error:
            raise DataError(f"{origin}: {first.where}: {error}") from None


def _listed(record: Record, name: str) -> str:
    close = difflib.get_close_matches(name, list(record), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    names = list(record)
    rest = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"its columns: {', '.join(names[:_MOST_SHOWN])}{rest}"
