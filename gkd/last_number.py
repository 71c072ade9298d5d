"""The number that a text ends in, as an answer to a sum does."""

from __future__ import annotations

import re

_MINUS = "\N{MINUS SIGN}"
# a sign is the number's own unless something that is subtracted from stands before it, as in 7-3
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]])[-+{_MINUS}])?(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


def last_number(text: str) -> str | None:
    """As `float` reads it: without commas of thousands, a minus sign as `-`; None where there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace(_MINUS, "-") if found else None
