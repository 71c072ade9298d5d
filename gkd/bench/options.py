"""Words that options of `gkd bench` take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from gkd.errors import InputError

T = TypeVar("T")


def named(table: Mapping[str, T], name: str, option: str) -> T:
    """What an option's word stands for. Raises InputError, starting with the option, for a word that is unknown."""
    if name not in table:
        raise InputError(f"{option}: {name!r} is none of {', '.join(table)}")
    return table[name]
