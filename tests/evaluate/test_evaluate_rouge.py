"""Rouge-L against pairs that were worked out by hand."""

from __future__ import annotations

import pytest

from gkd.evaluate.rouge import rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # Lin 2004, section 3.1: LCS "police the gunman" and "the gunman", of 4 words each
        ("police kill the gunman", "police killed the gunman", 2 * 3 / 8),
        ("the gunman kill police", "police killed the gunman", 2 * 2 / 8),
        ("the the the", "the", 2 * 1 / 4),
        ("a b c d", "d c b a", 2 * 1 / 8),
        ("a x b y c", "a b c", 2 * 3 / 8),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("Straße früh", "früh straße", 2 * 1 / 4),
        ("snake_case", "snake case", 1.0),
        ("nothing shared", "with this", 0.0),
        ("", "a reference", 0.0),
        ("an answer", "...", 0.0),
        ("", "!", 1.0),
    ],
)
def test_pairs_worked_out_by_hand(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)
    assert rouge_l(reference, answer) == pytest.approx(expected), "an F1 does not know which side is which"
