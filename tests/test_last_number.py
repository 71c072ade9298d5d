"""The number that a text ends in."""

from __future__ import annotations

import pytest

from gkd.last_number import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e3 of 5%", "5"),
        ("-.5", "-.5"),
        ("- . ,", None),
        ("It is 1,391.", "1391"),
        ("x = -2.50", "-2.50"),
        ("= \N{MINUS SIGN}4", "-4"),
        ("7-3", "3"),  # what is subtracted is no negative number
        ("(2+5)-3", "3"),
        ("3 - 4", "4"),
        ("3 -4", "-4"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("6.02e+23 of them", "6.02e+23"),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number
    if number is not None:
        float(number)
