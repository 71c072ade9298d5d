"""6 steps = 3 steps + resume + 3 steps, bitwise, on the deterministic path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import MakeConfig, check, read_metrics, run_gkd
from safetensors.torch import load_file


def without_times(run: Path) -> list[dict[str, object]]:
    return [
        {k: v for k, v in r.items() if not k.startswith("time/") and not k.endswith("_per_s")}
        for r in read_metrics(run)
    ]


@pytest.mark.slow
def test_resume_is_bitwise(make_run_config: MakeConfig, tmp_path: Path) -> None:
    sections = {
        "run": {"steps": 6, "save_every": 3},
        "optim": {"lr": 3e-3},
        "mixture": {"student": {"from": 1.0, "to": 0.4, "steps": 5}, "teacher": 0.0,
                    "dataset": {"from": 0.0, "to": 0.6, "steps": 5}},
        "rollout": {"max_new_tokens": {"from": 4.0, "to": 12.0, "steps": 4}},
        "objective": {
            "temperature": {"metric": "loss", "from": 2.0, "to": 1.0, "low": 0.0, "high": 10.0, "smoothing": 0.5},
            "weights": {"rule": "dwa", "window": 1},
            "terms": [
                {"kind": "reverse_kl", "token_weight": {"drift": {}}},
                {"kind": "cross_entropy", "on": ["dataset"], "weight": {"from": 0.0, "to": 0.5, "steps": 4}},
            ],
        },
    }  # fmt: skip
    check(run_gkd(["train", make_run_config("whole", **sections)]))
    halves = make_run_config("halves", **sections)
    check(run_gkd(["train", halves, "run.steps=3"]))
    resumed = check(run_gkd(["train", halves, "--resume"]))
    assert "resumed at step 3" in resumed.stdout

    whole, again = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "halves")
    heats = [record["objective/temperature"] for record in without_times(tmp_path / "whole")]
    assert heats[0] == 2.0 and len(set(heats)) == 6, "it follows the loss, through the checkpoint"

    positions = [read_metrics(tmp_path / name, "heldout_positions.jsonl") for name in ("whole", "halves")]
    assert [[record["step"] for record in records] for records in positions] == [[0, 6], [0, 3, 6]]
    assert positions[0] == positions[1][::2]
    for moment in ("before", "after"):
        first, second = (tmp_path / name / "samples" / f"tokens_{moment}.json" for name in ("whole", "halves"))
        assert first.read_bytes() == second.read_bytes()
    page = Path(check(run_gkd(["report", tmp_path / "halves"])).stdout.splitlines()[0]).read_text()
    assert page.count(" data-strip=") == 1 and page.count(" data-answer=") == 4, "two answers, before and after"


@pytest.mark.slow
@pytest.mark.long
def test_a_second_run_reads_the_scores_of_the_first(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    sections = {"teacher": {"cache_gib": 0.1}, "mixture": {"student": 0.0, "teacher": 0.5, "dataset": 0.5}}
    check(run_gkd(["train", make_run_config("first", **sections)]))
    (folder,) = (tmp_path / "cache" / "scores").iterdir()
    written = {path.name for path in folder.iterdir()}
    assert len(written) > 10
    check(run_gkd(["train", make_run_config("second", **sections)]))
    assert {path.name for path in folder.iterdir()} == written
    assert without_times(tmp_path / "first") == without_times(tmp_path / "second")
