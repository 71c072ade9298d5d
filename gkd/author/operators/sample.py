"""`sample`: some of the records, or rows of another file beside them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from math import isnan
from typing import Any

from gkd.author.operators.base import Operator
from gkd.author.operators.keep import number_in
from gkd.author.records import Drop, Record, RowState, Tally
from gkd.author.spec import ExamplesForm, SampleForm
from gkd.author.templates import Expression, RenderError
from gkd.data.sources import stream_objects
from gkd.errors import ConfigError
from gkd.seeding import derive_seed, derive_uniform


class Sample(Operator):
    def __init__(self, form: SampleForm, index: int, where: str, seed: int) -> None:
        """Raises ConfigError for an expression that is none, DataError for a file that cannot be read."""
        super().__init__(index, where)
        self._form, self._seed = form, seed
        self._best = None if form.best is None else Expression(form.best, f"{where}.best")
        self.needs = {} if self._best is None else dict.fromkeys(self._best.needs, f"{where}.best")
        self._examples: list[dict[str, Any]] = []
        if form.examples is not None:
            self._examples = _read_examples(form.examples, f"{where}.examples")
            self.makes = [form.examples.into]

    def of_row(self, row: RowState, tally: Tally) -> Iterable[Record]:
        if self._form.examples is not None:
            drawn = self._draw_examples(row, self._form.examples)
            return [{**record, self._form.examples.into: drawn} for record in row.records]
        return super().of_row(row, tally) if self._form.most is None else self._most(row, tally, self._form.most)

    def of_record(self, record: Record, row: RowState) -> Record:
        place = next(place for place, other in enumerate(row.records) if other is record)
        if self._draw(row, place) >= (self._form.share or 0.0):
            raise Drop("not drawn")
        return record

    def _most(self, row: RowState, tally: Tally, most: int) -> Iterable[Record]:
        """The best, of equally good ones some that are drawn, in their order; what cannot be ranked is dropped."""
        worth: dict[int, float] = {}
        for place, record in enumerate(row.records):
            try:
                worth[place] = self._worth(record)
            except (Drop, RenderError) as why:
                tally.drop(self.index, Drop("nothing to rank by", str(why)), row.origin, record)
        ranked = sorted(worth, key=lambda place: (-worth[place], self._draw(row, place)))
        for place in sorted(ranked[most:]):
            tally.drop(
                self.index, Drop("not among the best" if self._best else "not drawn"), row.origin, row.records[place]
            )
        return [row.records[place] for place in sorted(ranked[:most])]

    def _worth(self, record: Record) -> float:
        if self._best is None:
            return 0.0
        found = number_in(self._best.value(record))
        if found is None or isnan(found):
            raise Drop("no number")
        return found

    def _draw(self, row: RowState, place: int) -> float:
        return derive_uniform(self._seed, "author", self.index, row.index, place)

    def _draw_examples(self, row: RowState, form: ExamplesForm) -> list[dict[str, Any]]:
        """Different ones, and not the row itself where it stands in their file."""
        drawn: dict[int, dict[str, Any]] = {}
        for number in count():
            place = derive_seed(self._seed, "examples", self.index, row.index, number) % len(self._examples)
            example = self._examples[place]
            if place not in drawn and not any(_is_same(record, example) for record in row.records[:1]):
                drawn[place] = example
            if len(drawn) == form.count or number > 64 * form.count:
                return list(drawn.values())
        raise AssertionError


def _read_examples(form: ExamplesForm, where: str) -> list[dict[str, Any]]:
    examples = [row for _, row in stream_objects(form.file, "train", key=f"{where}.file")]
    if len(examples) <= form.count:
        raise ConfigError(f"{where}.count: {form.file} has {len(examples)} rows, and {form.count} of others are drawn")
    return examples


def _is_same(record: Record, example: Record) -> bool:
    """Whether they agree in all columns that both have."""
    shared = record.keys() & example.keys()
    return bool(shared) and all(record[name] == example[name] for name in shared)
