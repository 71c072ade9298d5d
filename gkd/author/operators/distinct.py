"""`distinct`: the first of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from gkd.author.operators.base import Operator
from gkd.author.records import Drop, Record, RowState, Tally
from gkd.author.spec import DistinctForm
from gkd.author.templates import Expression

_WORD = re.compile(r"\w+")


class Distinct(Operator):
    def __init__(self, form: DistinctForm, index: int, where: str) -> None:
        """Raises ConfigError for an expression that is none."""
        super().__init__(index, where)
        self._form = form
        self._of = Expression(form.of, f"{where}.of")
        self._seen: set[bytes] = set()  # among all: of every text so far
        self.needs = dict.fromkeys(self._of.needs, f"{where}.of")
        self.goes_in_order = form.among == "all"

    def of_row(self, row: RowState, tally: Tally) -> Iterable[Record]:
        if self._form.among == "row":
            self._seen = set()
        return super().of_row(row, tally)

    def of_record(self, record: Record, row: RowState) -> Record:
        words = words_of(str(self._of.value(record)))
        kinds = set(digests(words, self._form.ngram))
        if not kinds:
            kinds = {_digest(words)}
        repeated = len(kinds & self._seen) / len(kinds)
        if repeated >= (self._form.overlap if self._form.ngram else 1.0):
            raise Drop("said before" if not self._form.ngram else "nearly said before")
        self._seen |= kinds
        return record


def words_of(text: str) -> list[str]:
    """Without case, spaces and punctuation."""
    return _WORD.findall(text.casefold())


def digests(words: list[str], ngram: int) -> Iterator[bytes]:
    """8 bytes of each run of `ngram` words; of all of them where there are fewer, or `ngram` is 0. None of no words."""
    size = ngram if 0 < ngram < len(words) else len(words)
    if words:
        yield from (_digest(words[start : start + size]) for start in range(len(words) - size + 1))


def _digest(words: list[str]) -> bytes:
    return blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=8).digest()
