"""Two texts in two columns, with what differs marked, for people to read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest

from gkd.monitor.text import clean

_COLUMN = 56  # characters


def side_by_side(left: str, right: str, titles: tuple[str, str]) -> list[str]:
    """Lines of both columns. Between them stands "|" where they differ, "<" and ">" where only one has anything."""
    return [
        f"{titles[0]:<{_COLUMN}}   {titles[1]}".rstrip(),
        *(f"{own:<{_COLUMN}} {mark} {other}".rstrip() for own, mark, other in _pairs(_lines(left), _lines(right))),
    ]


def _pairs(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for kind, i, i_end, j, j_end in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for own, other in zip_longest(left[i:i_end], right[j:j_end]):
            mark = " " if kind == "equal" else "<" if other is None else ">" if own is None else "|"
            yield own or "", mark, other or ""


def _lines(text: str) -> list[str]:
    """As long as a column at most; a line end of the text ends one, and an empty line is one."""
    return [part for line in clean(text).split("\n") for part in (textwrap.wrap(line, _COLUMN) or [""])]
