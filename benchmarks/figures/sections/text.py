"""Numbers as people read them, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def section(parts: Iterable[str]) -> str:
    """Paragraphs and tables, one under another."""
    return "\n\n".join(parts) or "Not measured yet."


def three_digits(number: str | float | None) -> str:
    """A number as people read it: 0.0123, 4.56, 78.9, 1234."""
    if number in ("", None):
        return "–"
    value = float(number)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: str | float) -> str:
    return "–" if share == "" else f"{three_digits(100 * float(share))} %"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words; the others are numbers, to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
