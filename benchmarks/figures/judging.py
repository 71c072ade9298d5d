"""What a claim is, and whether it holds: as a page states it, and against figures measured anew."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.sections.text import markdown


@dataclass(frozen=True)
class Figure:
    """A number that a file of a folder of results holds or gives. Reading raises FileNotFoundError without the file,
    ValueError or KeyError if it holds no such number."""

    file: str
    read: Callable[[Path], float]  # of that file

    def __call__(self, results: Path) -> float:
        return self.read(results / self.file)


@dataclass(frozen=True)
class Again:
    """The small run of `make evidence` that measures a figure once more, and between which multiples of the committed
    one it may lie; `why` says where the width comes from."""

    run: str
    least: float
    most: float
    why: str
    floor: float = 0.0  # it may not lie below, however small the committed one: 1 where faster is claimed

    def holds(self, committed: float, now: float) -> bool:
        return max(self.least * committed, self.floor) <= now <= self.most * committed

    def __str__(self) -> str:
        if self.floor:
            return f"≥ {self.least:g} × and ≥ {self.floor:g}"
        if self.most == float("inf"):
            return f"≥ {self.least:g} ×"
        return f"≤ {self.most:g} ×" if self.least == 0 else f"{self.least:g} – {self.most:g} ×"


@dataclass(frozen=True)
class Claim:
    """A figure that pages state. The one group of `says`, a regular expression over a page, is the figure."""

    name: str
    says: str
    figure: Figure
    again: Again | None = None
    pages: tuple[str, ...] = ("README.md",)


@dataclass(frozen=True)
class Verdict:
    """One line of evidence's table. `holds` is None where no small run measures the claim, or its run was not asked
    for."""

    claim: Claim
    committed: float | None
    now: float | None
    holds: bool | None
    note: str = ""

    def __str__(self) -> str:
        """Why it does not hold."""
        margin = f"{self.claim.again} ({self.claim.again.why})" if self.claim.again else "–"
        figures = f"now {shown(self.now)}, committed {shown(self.committed)}, margin {margin}"
        return f"{self.claim.name}: {figures}{f'; {self.note}' if self.note else ''}"


# ---- figures in files


def of(file: str, *keys: str) -> Figure:
    """A number in a JSON, by the keys on the way to it."""

    def read(path: Path) -> float:
        value = json.loads(path.read_text())
        for key in keys:
            value = value[key]
        return float(value)

    return Figure(file, read)


def over(above: Figure, below: Figure, scale: float = 1.0) -> Figure:
    """The ratio of two numbers in one file."""
    return Figure(above.file, lambda path: scale * above.read(path) / below.read(path))


def column(file: str, name: str, choose: Callable[[Iterable[float]], float], **where: str) -> Figure:
    """The least or the greatest number in a column of a CSV, of the rows that have these values."""

    def read(path: Path) -> float:
        with path.open(newline="") as opened:
            rows = [row for row in csv.DictReader(opened) if where.items() <= row.items() and row[name]]
        return choose(float(row[name]) for row in rows)  # ValueError if there are none

    return Figure(file, read)


# ---- as a page states them


def disagreements(claim: Claim, root: Path, results: Path) -> list[str]:
    """What is wrong with a claim's pages, one line each. A page that says nothing of results that are not there yet
    is right."""
    wrong, figure, file = [], committed_figure(claim, results), claim.figure.file
    for name in claim.pages:
        page, start = (root / name).read_text(encoding="utf-8"), f"{name}: {claim.name}:"
        texts = re.findall(claim.says, page)
        if figure is None:
            wrong += [f"{start} says {text}, but there is no {results / file}" for text in texts]
            continue
        wrong += [f"{start} says {text}, {file} says {figure:.6g}" for text in texts if not agrees(text, figure)]
        if not texts:
            wrong.append(f"{start} not there, as {claim.says!r}; benchmarks/figures/claims.py has to agree")
        elif name == "README.md" and f"benchmarks/results/{file}" not in page:
            wrong.append(f"{start} does not name benchmarks/results/{file}")
    return wrong


def committed_figure(claim: Claim, results: Path) -> float | None:
    try:
        return claim.figure(results)
    except FileNotFoundError:
        return None


def agrees(text: str, figure: float) -> bool:
    """Whether a figure, rounded to the digits that are shown, is what is shown."""
    number, last_digit = parsed(text)
    return abs(number - figure) <= 0.5000001 * last_digit


def parsed(text: str) -> tuple[float, float]:
    """(value, value of its last digit): 22.3 is (22.3, 0.1), 1.3e-07 (1.3e-07, 1e-08), 6m46s (406, 1)."""
    minutes = re.fullmatch(r"(\d+)m(\d+)s", text)
    if minutes:
        return 60.0 * int(minutes[1]) + int(minutes[2]), 1.0
    mantissa, _, exponent = text.replace(",", "").removesuffix("s").partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(f"{mantissa}e{exponent or 0}"), 10.0 ** (int(exponent or 0) - decimals)


# ---- against figures measured anew


def judged(claim: Claim, committed: Path, fresh: Path, runs: Set[str]) -> Verdict:
    """`runs` are the small runs that were asked for: a claim of one of them without a figure does not hold."""
    before, again = committed_figure(claim, committed), claim.again
    if before is None:
        return Verdict(claim, None, None, None, "not measured yet")
    if again is None:
        return Verdict(claim, before, None, None, "no small run")
    if again.run not in runs:
        return Verdict(claim, before, None, None, "not asked for")
    try:
        now = claim.figure(fresh)
    except (OSError, ValueError, KeyError):
        return Verdict(claim, before, None, False, f"the run of {again.run} left no such figure")
    return Verdict(claim, before, now, again.holds(before, now))


def table(verdicts: Iterable[Verdict]) -> str:
    rows = []
    for one in verdicts:
        holds = {True: "yes", False: "NO", None: "–"}[one.holds]
        margin = str(one.claim.again) if one.claim.again else "–"
        rows.append([one.claim.name, shown(one.committed), shown(one.now), margin, f"{holds} {one.note}".rstrip()])
    return markdown(["claim", "committed", "now", "margin", "holds"], rows)


def shown(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4g}"
