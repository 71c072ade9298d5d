"""A teacher sharded over two ranks says what a whole one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check, torchrun

JOB = Path(__file__).parent / "sharded_job.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_with_different_work(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, dtype: str) -> None:
    paths = f"{Path(__file__).parents[1]}:{Path(__file__).parents[1] / 'invariants'}"
    check(torchrun(2, [JOB, tmp_path / "out", tiny_teacher, tiny_student, dtype], PYTHONPATH=paths))
    for rank in (0, 1):
        result = json.loads((tmp_path / f"out.{rank}").read_text())
        assert result["differences"] == [0.0, 0.0, 0.0, 0.0]  # the third: of views
        assert result["share"] < 0.55  # of the backbone's parameters; a little padding
