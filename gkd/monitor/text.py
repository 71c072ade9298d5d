"""Text from anywhere, made harmless: a model's words must never act as markup, escape codes or file structure."""

from __future__ import annotations

import unicodedata

NEWLINE_MARK = "\N{RETURN SYMBOL}"
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need
_LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"
_FORBIDDEN = {"Cc", "Cf", "Cs"}  # controls (escape included), invisible and direction-changing ones, lone surrogates


def clean(text: str, newline: str = "\n") -> str:
    """`text` without control, direction-changing and surrogate characters; every kind of line end -> `newline`.

    A tab becomes four spaces. What is left of an escape sequence stays as plain, harmless letters. It is still
    to be shown as `rich.text.Text`: rich reads markup in a plain string.
    """
    kept: list[str] = []
    for character in text.replace("\r\n", "\n"):
        if character in _LINE_ENDS:
            kept.append(newline)
        elif character == "\t":
            kept.append("    ")
        elif character in _JOINERS or unicodedata.category(character) not in _FORBIDDEN:
            kept.append(character)
    return "".join(kept)


def shorten(text: str, max_lines: int, max_characters: int) -> str:
    """The beginning of `text`, blank lines left out, with an ellipsis if anything was cut."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    short = "\n".join(lines[:max_lines])[:max_characters].rstrip()
    return short if len(short) == len("\n".join(lines)) else f"{short} \N{HORIZONTAL ELLIPSIS}"


def format_duration(seconds: float) -> str:
    """`4.1s`, `45s`, `1m52s`, `2h05m`, `3d04h`: at most six characters up to 99 days."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_value(value: float) -> str:
    """Three decimals, or scientific where those would show next to nothing."""
    return f"{value:.3f}" if value == 0 or not abs(value) < 0.01 else f"{value:.1e}"


def format_rate(per_second: float) -> str:
    """`8.3`, `812`, `12.3k`, `4.5M`."""
    if per_second < 10:
        return f"{per_second:.1f}"
    if per_second < 1e4:
        return f"{per_second:.0f}"
    return f"{per_second / 1e3:.1f}k" if per_second < 1e6 else f"{per_second / 1e6:.1f}M"
