"""A short soak, and what it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.runs.soak.__main__ import faults_of, soak
from benchmarks.runs.soak.faults import FAULTS, drawn


def test_faults_are_drawn_from_the_seed() -> None:
    faults = drawn(0, 2 * len(FAULTS), 2000, list(FAULTS))
    assert faults == drawn(0, 2 * len(FAULTS), 2000, list(FAULTS)) != drawn(1, 2 * len(FAULTS), 2000, list(FAULTS))
    assert {fault.kind for fault in faults[: len(FAULTS)]} == set(FAULTS), "each before one comes again"
    assert [fault.step for fault in faults] == sorted({fault.step for fault in faults})


@pytest.mark.long
@pytest.mark.fault
def test_a_run_under_faults_is_the_undisturbed_run(tmp_path: Path) -> None:
    record = soak(tmp_path, steps=30, seed=0, count=3)
    assert not faults_of(record)
    assert sum(record["faults"].values()) == 3 and record["undisturbed"]["resumes"] == 0
