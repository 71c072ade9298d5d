"""A sampler whose weights are split over the ranks of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import MakeConfig, check, read_metrics, run_gkd, torchrun


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_over_two_ranks_trains_as_an_engine_on_one(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """Its weights are split, new ones arrive after every step, and it sleeps in between."""
    rollout = {"engine": "vllm", "max_new_tokens": 12}
    one = make_run_config("one", rollout=rollout)
    two = make_run_config("two", rollout=rollout | {"tensor_parallel": 2, "sleep_level": 2})
    check(run_gkd(["train", one]))
    check(torchrun(2, ["-m", "gkd", "train", two]))
    alone, together = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["tokens/generated"] == a["tokens/generated"] > 0
        assert b["sync/max_logprob_error"] < 1e-4
    answers = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert answers[1]["heldout_jsd_after"] == pytest.approx(answers[0]["heldout_jsd_after"], rel=1e-4)
    shown = [(tmp_path / name / "samples.md").read_text().partition("\n")[2] for name in ("one", "two")]
    assert shown[0] == shown[1], "the main rank's greedy answers"
