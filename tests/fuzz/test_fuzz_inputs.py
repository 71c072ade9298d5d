"""A short part of `PYTHONPATH=tests python -m fuzz`: never a traceback, a message of two lines, or a hang."""

from __future__ import annotations

import pytest

from fuzz.trial import TRIALS


@pytest.mark.parametrize("name", TRIALS)
def test_no_input_is_a_traceback(name: str) -> None:
    trial, _, short = TRIALS[name]
    outcome = trial(1, short)
    assert not outcome.faults, "\n\n".join(outcome.faults[:3])
    assert outcome.counts["refused"] > short // 50, "inputs that nothing is wrong with prove nothing"
