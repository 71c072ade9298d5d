"""Whether a row shares a run of words with held-out texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from gkd.author.operators.distinct import digests, words_of
from gkd.author.records import Drop
from gkd.data.sources import stream_objects
from gkd.schema import is_mapping


class Contamination:
    """Runs of `ngram` words of all texts in a held-out file; of a shorter text, all of it."""

    def __init__(self, path: str, split: str, ngram: int) -> None:
        """Raises DataError for a file that cannot be read."""
        self._ngram = ngram
        self._held = {
            found
            for _, row in stream_objects(path, split, key="--heldout")
            for text in texts_of(row)
            for found in digests(words_of(text), ngram)
        }

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises Drop for a row with such a run."""
        for text in texts_of(row):
            if any(found in self._held for found in digests(words_of(text), self._ngram)):
                raise Drop(f"shares {self._ngram} words in a row, or a whole text, with --heldout", text)


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row, at any depth; of messages their contents."""
    if isinstance(value, str):
        yield value
    elif is_mapping(value):
        is_message = {"role", "content"} <= set(value)
        for name, item in value.items():
            if not (is_message and name == "role") and name != "task":
                yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from texts_of(item)
