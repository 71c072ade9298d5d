"""The prompts in configs/: enough, well-formed, and no held-out one seen in training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gkd.data.formats import read_rows

FOLDER = Path(__file__).parents[2] / "configs" / "prompts"


def contents(name: str) -> list[str]:
    rows = read_rows(str(FOLDER / name), "train")
    for row in rows:
        assert row.completion_messages is None
        assert [message["role"] for message in row.messages or ()] == ["user"]
    return [row.messages[0]["content"] for row in rows if row.messages]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(("name", "at_least"), [("train.jsonl", 360), ("heldout.jsonl", 48)])
def test_number_and_length(name: str, at_least: int) -> None:
    texts = contents(name)
    assert len(texts) >= at_least
    assert all(5 <= len(text.split()) <= 80 for text in texts)
    assert all(text == text.strip() for text in texts)
    assert all(line.isprintable() for text in texts for line in text.split("\n"))


def test_no_duplicates() -> None:
    texts = [" ".join(text.lower().split()) for name in ("train.jsonl", "heldout.jsonl") for text in contents(name)]
    assert len(set(texts)) == len(texts)


def test_no_near_duplicates_across_the_split() -> None:
    """No two share more than half of their words."""
    train = [words(text) for text in contents("train.jsonl")]
    for text in contents("heldout.jsonl"):
        heldout = words(text)
        assert all(len(heldout & other) <= 0.5 * len(heldout | other) for other in train), text


def test_no_template_fills_the_file() -> None:
    """At most one prompt in fifty begins with the same four words."""
    texts = contents("train.jsonl")
    openings = [tuple(text.lower().split()[:4]) for text in texts]
    assert max(map(openings.count, openings)) <= len(texts) / 50
