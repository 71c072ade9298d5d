"""What stands beside the data, by what that is called."""

from __future__ import annotations

from pathlib import Path


def card_path(out: Path) -> Path:
    return out.with_suffix(".card.md")


def page_path(out: Path) -> Path:
    return out.with_suffix(".html")
