"""What a teacher said, where a test knows of which kind it is."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.types import HiddenScores, TeacherScores, TopkScores


def whole(scores: Sequence[TeacherScores]) -> list[HiddenScores]:
    """Hidden states of each rollout."""
    found = [one for one in scores if isinstance(one, HiddenScores)]
    assert len(found) == len(scores)
    return found


def topk(scores: Sequence[TeacherScores]) -> list[TopkScores]:
    """The most likely tokens of each rollout."""
    found = [one for one in scores if isinstance(one, TopkScores)]
    assert len(found) == len(scores)
    return found
