"""Rouge-L of two texts (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3).

Own, because it is fifteen lines and the package `rouge-score` brings four dependencies and was last released in 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, between 0 and 1: 2 LCS / (words of both).

    That is the harmonic mean of LCS / words of the answer and LCS / words of the reference, Lin's beta = 1. Words are
    runs of letters and digits in lower case, of any script. Two texts without a word are equal: 1.
    """
    answer_words, reference_words = _words(answer), _words(reference)
    both = len(answer_words) + len(reference_words)
    return 2 * _longest_common_subsequence(answer_words, reference_words) / both if both else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    lengths = [0] * (len(right) + 1)  # of the words of `left` so far and each beginning of `right`
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]
