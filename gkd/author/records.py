"""What goes through a recipe's steps: the records that came of an input row; and how many were dropped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]  # an input row's columns, and the fields that steps have made
_EXAMPLES = 3  # of each reason, for people to look at
_LONGEST_REASON = 160


@dataclass(slots=True)
class RowState:
    """An input row on its way: what is left of it, and what it has brought."""

    index: int  # in the data
    origin: str  # "file:line"
    records: list[Record]
    written: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class Drop(Exception):  # noqa: N818  no error: a record that does not go on
    """A record goes no further; the text is the reason that it is counted under. `detail` is of this record alone."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Example:
    """A record that was dropped, for people to look at."""

    origin: str
    detail: str
    record: Record


@dataclass
class Tally:
    """How many records each step was given and what became of them."""

    names: list[str]  # of the steps
    given: Counter[int] = field(default_factory=Counter[int])
    kept: Counter[int] = field(default_factory=Counter[int])
    dropped: Counter[tuple[int, str]] = field(default_factory=Counter[tuple[int, str]])
    examples: dict[tuple[int, str], list[Example]] = field(default_factory=dict[tuple[int, str], list[Example]])
    rows: int = 0  # of the input, done
    rows_without: int = 0  # of these, those that brought nothing
    written: int = 0

    def drop(self, step: int, why: Drop, origin: str, record: Record) -> None:
        key = step, why.reason[:_LONGEST_REASON]
        self.dropped[key] += 1
        examples = self.examples.setdefault(key, [])
        if len(examples) < _EXAMPLES:
            examples.append(Example(origin, why.detail, record))

    def passed(self, step: int, given: int, kept: int) -> None:
        self.given[step] += given
        self.kept[step] += kept

    def add(self, other: Tally) -> None:
        """Of rows that come after those so far."""
        self.given.update(other.given)
        self.kept.update(other.kept)
        self.dropped.update(other.dropped)
        for key, examples in other.examples.items():
            mine = self.examples.setdefault(key, [])
            mine += examples[: _EXAMPLES - len(mine)]

    def reasons(self) -> Iterable[tuple[str, str, int]]:
        """(step, reason, how many), in the order of the steps, the most frequent reason first."""
        for (step, reason), count in sorted(self.dropped.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
            yield self.names[step], reason, count
