"""A sampler whose weights are split over the ranks of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import MakeConfig, check, read_metrics, torchrun


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_over_two_ranks_trains_as_an_engine_on_one(
    finished_run: Callable[..., Path], make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """Its weights are split, new ones arrive after every step, and it sleeps in between."""
    shared_memory = Path("/dev/shm")
    of_another_run = shared_memory / "-tp:0-[0-1]-cpushm_0"  # under the name that vLLM would give ours too
    of_another_run.touch()
    before = set(shared_memory.iterdir())
    rollout = {"engine": "vllm"}
    runs = finished_run(rollout=rollout), tmp_path / "two"
    two = make_run_config("two", rollout=rollout | {"tensor_parallel": 2, "sleep_level": 2})
    check(torchrun(2, ["-m", "gkd", "train", two]))
    assert not [file for file in set(shared_memory.iterdir()) - before if "shm" in file.name or "gkd" in file.name]
    of_another_run.unlink()
    alone, together = map(read_metrics, runs)
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["tokens/generated"] == a["tokens/generated"] > 0
        assert b["sync/max_logprob_error"] < 1e-4
    answers = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert answers[1]["heldout_jsd_after"] == pytest.approx(answers[0]["heldout_jsd_after"], rel=1e-4)
    shown = [(run / "samples.md").read_text().partition("\n")[2] for run in runs]
    assert shown[0] == shown[1], "the main rank's greedy answers"
