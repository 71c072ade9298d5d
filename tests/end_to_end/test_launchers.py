"""The same run under torchrun and the deepspeed launcher: two processes over gloo, each with its own vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import MakeConfig, check, read_metrics, run, run_python, torchrun


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.vllm
def test_torchrun_with_student_and_teacher_at_zero_3_equals_one_process(
    finished_run: Callable[..., Path], make_run_config: MakeConfig, tmp_path: Path
) -> None:
    vllm = {"engine": "vllm"}
    alone, together = finished_run(rollout=vllm), tmp_path / "two"
    two = make_run_config("two", deepspeed={"zero_stage": 3}, teacher={"placement": "sharded"}, rollout=vllm)
    check(torchrun(2, ["-m", "gkd", "train", two, "optim.micro_batch_size=2"]))
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    for key in ("tokens/scored", "tokens/generated", "mixture/student"):
        assert [r[key] for r in read_metrics(together)] == [r[key] for r in read_metrics(alone)], key
    one, other = (json.loads((run / "summary.json").read_text()) for run in (alone, together))
    assert other["heldout_forward_kl_before"] == pytest.approx(one["heldout_forward_kl_before"], rel=1e-5)
    assert other["heldout_forward_kl_after"] == pytest.approx(one["heldout_forward_kl_after"], rel=1e-2)
    tokens = [json.loads((run / "samples" / "tokens_before.json").read_text()) for run in (alone, together)]
    for answer, same in zip(tokens[0]["answers"], tokens[1]["answers"], strict=True):
        assert [token["id"] for token in same["tokens"]] == [token["id"] for token in answer["tokens"]]
        values = [token["forward_kl"] for token in answer["tokens"]]
        assert [token["forward_kl"] for token in same["tokens"]] == pytest.approx(values, rel=1e-4)
    profiles = [read_metrics(run, "heldout_positions.jsonl")[0] for run in (alone, together)]
    assert profiles[1]["tokens"] == profiles[0]["tokens"]
    assert profiles[1]["forward_kl"] == pytest.approx(profiles[0]["forward_kl"], rel=1e-4)


@pytest.mark.slow
def test_packed_on_two_ranks_equals_padded_on_one_and_goes_on_with_two(
    finished_run: Callable[..., Path], make_run_config: MakeConfig, tmp_path: Path
) -> None:
    padded = finished_run()
    sections = {"deepspeed": {"zero_stage": 3}, "student": {"gradient_checkpointing": True}, "run": {"save_every": 2}}
    train = ["-m", "gkd", "train", make_run_config("packed", **sections), "optim.micro_batch_tokens=80"]
    check(torchrun(2, train))
    assert losses(tmp_path / "packed") == pytest.approx(losses(padded), rel=1e-3)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (padded, tmp_path / "packed"))
    assert other["heldout_forward_kl_before"] == pytest.approx(one["heldout_forward_kl_before"], rel=1e-5)

    resumed = check(torchrun(2, [*train, "run.steps=4", "--resume"]))
    assert "resumed at step 3" in resumed.stdout
    refused = run_python([*train, "run.steps=5", "--resume"])
    assert refused.returncode == 2 and "world_size was 2, is 1" in refused.stderr


@pytest.mark.slow
def test_the_deepspeed_launcher(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config("launched", deepspeed={"zero_stage": 2}, run={"steps": 2})
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [deepspeed, "--num_gpus", "2", "--master_port", "29611", "--module", "gkd", "train", config]
    check(run([*command, "optim.micro_batch_size=2"], DS_ACCELERATOR="cpu"))
    assert len(losses(tmp_path / "launched")) == 2
