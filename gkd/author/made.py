"""What a run of a recipe has brought, for its card and its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gkd.author.authors.kept import Spent
from gkd.author.recipe import Recipe
from gkd.author.records import Tally
from gkd.author.shown import ShownRows


@dataclass
class Made:
    recipe: Recipe
    data: str
    out: Path
    heldout: str | None
    tally: Tally
    shown: ShownRows
    spent: Spent = field(default_factory=Spent)
    rows: int = 0  # of the input
