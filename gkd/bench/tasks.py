"""Four kinds of problems that a program makes and checks. Every character is a token, so that tiny models learn them.

    chain      t7295=       091823    running totals, 7 + 2, 9 + 9, 18 + 5: several steps, of which the last counts
    counting   cbaabab=     a3b3      letters in order, and how often each is there
    sorting    sgkbaz=      abgkz     letters in order
    spacing    paaabbc=     abacab    the same letters with no two neighbours alike: many right answers

reasoning-gym has such tasks too, but in sentences of a hundred characters, which a model that is trained from scratch
in minutes would have to learn to read first.
"""

from __future__ import annotations

import itertools
import random
import statistics
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

ALPHABET = string.digits + string.ascii_lowercase + "="


@dataclass(frozen=True)
class Problem:
    """`answer` is one right completion; a task that has several gives one of them at random."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """`make` draws a problem; `is_right` judges a completion by the prompt alone."""

    make: Callable[[random.Random], Problem]
    is_right: Callable[[str, str], bool]


def is_right(problem: Problem, completion: str) -> bool:
    return TASKS[problem.task].is_right(problem.prompt, completion)


def problems(seed: int, count_a_task: int, exclude: Collection[str] = ()) -> list[Problem]:
    """`count_a_task` different problems of each task in turn, none of whose prompts is in `exclude`."""
    draw, taken, made = random.Random(seed), set(exclude), []
    for _ in range(count_a_task):
        for task in TASKS.values():
            problem = task.make(draw)
            while problem.prompt in taken:
                problem = task.make(draw)
            taken.add(problem.prompt)
            made.append(problem)
    return made


def by_task(problems: Sequence[Problem], values: Sequence[float]) -> dict[str, float]:
    """The mean over the problems of each task."""
    pairs = list(zip(problems, values, strict=True))
    return {task: statistics.fmean(value for problem, value in pairs if problem.task == task) for task in TASKS}


# ---- chain


def _make_chain(draw: random.Random) -> Problem:
    digits = draw.choices(range(10), k=draw.randint(4, 7))
    totals = itertools.islice(itertools.accumulate(digits), 1, None)
    return Problem("chain", f"t{''.join(map(str, digits))}=", "".join(f"{total:02}" for total in totals))


def _is_right_chain(prompt: str, completion: str) -> bool:
    """The last total is the answer, as in a worked solution; the steps before it are not looked at."""
    return completion[-2:] == f"{sum(map(int, prompt[1:-1])):02}"


# ---- counting


def _make_counting(draw: random.Random) -> Problem:
    kinds = draw.sample(string.ascii_lowercase, draw.randint(2, 4))
    letters = kinds + draw.choices(kinds, k=draw.randint(3, 5))
    draw.shuffle(letters)
    return Problem("counting", f"c{''.join(letters)}=", _counts(letters))


def _is_right_counting(prompt: str, completion: str) -> bool:
    return completion == _counts(prompt[1:-1])


def _counts(letters: Sequence[str]) -> str:
    return "".join(f"{letter}{count}" for letter, count in sorted(Counter(letters).items()))


# ---- sorting


def _make_sorting(draw: random.Random) -> Problem:
    letters = draw.choices(string.ascii_lowercase, k=draw.randint(5, 7))
    return Problem("sorting", f"s{''.join(letters)}=", "".join(sorted(letters)))


def _is_right_sorting(prompt: str, completion: str) -> bool:
    return completion == "".join(sorted(prompt[1:-1]))


# ---- spacing


def _make_spacing(draw: random.Random) -> Problem:
    """Letters of which the most frequent is at most half, so that there is an answer."""
    while True:
        kinds = draw.sample(string.ascii_lowercase, 3)
        letters = kinds + draw.choices(kinds, k=draw.randint(2, 4))
        if max(Counter(letters).values()) <= (len(letters) + 1) // 2:
            return Problem("spacing", f"p{''.join(sorted(letters))}=", _spaced(letters, draw))


def _spaced(letters: list[str], draw: random.Random) -> str:
    """A random order without equal neighbours: drawn until one fits."""
    while any(one == other for one, other in itertools.pairwise(letters)):
        draw.shuffle(letters)
    return "".join(letters)


def _is_right_spacing(prompt: str, completion: str) -> bool:
    apart = all(one != other for one, other in itertools.pairwise(completion))
    return apart and sorted(completion) == sorted(prompt[1:-1])


TASKS = {
    "chain": Task(_make_chain, _is_right_chain),
    "counting": Task(_make_counting, _is_right_counting),
    "sorting": Task(_make_sorting, _is_right_sorting),
    "spacing": Task(_make_spacing, _is_right_spacing),
}
