"""Where in a completion the student differs from the teacher: the strip by position, and answers token by token.

Everything that can be read is written into the page; its script shows the numbers of a cell or token on demand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from gkd.measures.answer_tokens import Alternative, AnswerToken
from gkd.monitor.text import NEWLINE_MARK, clean
from gkd.report.data import Column, PositionProfile, RunData

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)  # nats of forward KL: borders of l0 to l6 in report.css
MAX_TOKENS = 512  # of an answer that are shown
_MAX_ROWS = 16  # of a strip
_SHOWN = "forward_kl"  # what strip and tokens are coloured by
_FAINTEST = 0.06  # opacity of 0 nats


class StripCell(NamedTuple):
    """A bucket of positions; `opacity` is the square root of its mean as a share of the greatest of all strips.

    The root, as divergences fall by an order of magnitude in a run, and what is left is what matters.
    """

    column: int
    row: int
    opacity: float


class StripFigures(NamedTuple):
    """A line of the table below a strip."""

    tokens: str
    means: list[float | None]  # of the first and the last measure


@dataclass(frozen=True)
class Strip:
    """A run's divergence by position: one row a measure, from before the first step to the latest."""

    run: str
    rows: list[str]
    columns: int
    cells: list[StripCell]
    last_token: int
    figures: list[StripFigures]
    ends: list[str]  # titles of the figures' means


class TokenSpan(NamedTuple):
    """A token as the page shows it; `level` is None where the divergence is not known."""

    text: str
    level: int | None


def strips(runs: Sequence[RunData]) -> list[Strip]:
    """Of the runs that measured positions; all on one scale."""
    greatest = strip_maximum(runs)
    return [_strip(run, greatest) for run in runs if run.positions]


def strip_maximum(runs: Sequence[RunData]) -> float:
    """The greatest mean of any cell, in nats; 0 without one."""
    columns = [profile.means[_SHOWN] for run in runs for profile in chosen_profiles(run)]
    return max((value for column in columns for value in column if value is not None), default=0.0)


def chosen_profiles(run: RunData) -> list[PositionProfile]:
    """The first, the last, and as many evenly between as a strip has room for."""
    count = len(run.positions)
    rows = min(count, _MAX_ROWS)
    places = [round(row * (count - 1) / max(1, rows - 1)) for row in range(rows)]
    return [run.positions[place] for place in places]


def moment(run: RunData, profile: PositionProfile) -> str:
    """What a row is called: `before`, `step 20`, `after`."""
    if profile.steps_done == 0:
        return "before"
    is_last = run.finished and profile.steps_done == run.steps_done
    return "after" if is_last else f"step {profile.steps_done:,}"


def strip_payload(runs: Sequence[RunData]) -> list[list[dict[str, Any]]]:
    """For the script: the rows of each strip with their numbers."""
    return [
        [
            {
                "label": moment(run, profile),
                "width": profile.bucket_tokens,
                "tokens": profile.tokens,
                **{name: _short(column) for name, column in profile.means.items()},
            }
            for profile in chosen_profiles(run)
        ]
        for run in runs
        if run.positions
    ]


def token_spans(tokens: Sequence[AnswerToken]) -> list[TokenSpan]:
    return [TokenSpan(visible(token.text, token.id), _level(token.forward_kl)) for token in tokens[:MAX_TOKENS]]


def token_payload(tokens: Sequence[AnswerToken]) -> list[list[Any]]:
    """For the script, of each token: text, three divergences, two probabilities, [text, probability] of the others."""
    return [
        [
            _name(token),
            *_short([token.forward_kl, token.reverse_kl, token.jsd]),
            *_short([token.student_probability, token.teacher_probability]),
            [[_name(other), *_short([other.probability])] for other in token.alternatives],
        ]
        for token in tokens[:MAX_TOKENS]
    ]


def visible(text: str, token_id: int) -> str:
    """A token's text such that it can be seen: line ends marked and kept, lone spaces as dots, nothing as its id."""
    shown = clean(text, newline=f"{NEWLINE_MARK}\n")
    if not shown.strip(f" {NEWLINE_MARK}\n"):
        shown = shown.replace(" ", "\N{MIDDLE DOT}")
    return shown or f"<{token_id}>"


def level_titles() -> list[str]:
    """Of l0, l1 and so on: `below 0.05`, `0.05 to 0.2`, ..., `4 and more`."""
    between = [f"{low:g} to {high:g}" for low, high in pairwise(LEVELS)]
    return [f"below {LEVELS[0]:g}", *between, f"{LEVELS[-1]:g} and more"]


def _strip(run: RunData, greatest: float) -> Strip:
    profiles = chosen_profiles(run)
    cells = [
        StripCell(column, row, round(_FAINTEST + (1 - _FAINTEST) * math.sqrt(max(0.0, value) / (greatest or 1.0)), 3))
        for row, profile in enumerate(profiles)
        for column, value in enumerate(profile.means[_SHOWN])
        if value is not None
    ]
    ends = [profiles[0], profiles[-1]] if len(profiles) > 1 else profiles
    first = profiles[0]
    return Strip(
        run=run.label,
        rows=[moment(run, profile) for profile in profiles],
        columns=len(first.tokens),
        cells=cells,
        last_token=len(first.tokens) * first.bucket_tokens,
        figures=[_figures(ends, bucket) for bucket in range(len(first.tokens))],
        ends=[moment(run, profile) for profile in ends],
    )


def _figures(ends: Sequence[PositionProfile], bucket: int) -> StripFigures:
    first, last = bucket * ends[0].bucket_tokens + 1, (bucket + 1) * ends[0].bucket_tokens
    return StripFigures(
        f"{first}" if first == last else f"{first} to {last}", [end.means[_SHOWN][bucket] for end in ends]
    )


def _name(token: AnswerToken | Alternative) -> str:
    return visible(token.text, token.id).rstrip("\n")


def _level(divergence: float | None) -> int | None:
    return None if divergence is None else sum(divergence >= border for border in LEVELS)


def _short(values: Sequence[float | None]) -> Column:
    return [None if value is None else float(f"{value:.4g}") for value in values]
