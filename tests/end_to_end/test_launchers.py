"""The same run under torchrun and the deepspeed launcher: two processes over gloo, each with its own vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import MakeConfig, check, read_metrics, run, run_gkd, torchrun


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.vllm
def test_torchrun_with_student_and_teacher_at_zero_3_equals_one_process(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    sections = {"rollout": {"engine": "vllm"}, "run": {"save_every": 2}}
    check(run_gkd(["train", make_run_config("one", **sections)]))
    two = make_run_config("two", deepspeed={"zero_stage": 3}, teacher={"placement": "sharded"}, **sections)
    check(torchrun(2, ["-m", "gkd", "train", two, "optim.micro_batch_size=2"]))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for key in ("tokens/scored", "tokens/generated", "mixture/student"):
        assert [r[key] for r in read_metrics(tmp_path / "two")] == [r[key] for r in read_metrics(tmp_path / "one")], key
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert other["heldout_forward_kl_before"] == pytest.approx(one["heldout_forward_kl_before"], rel=1e-5)
    assert other["heldout_forward_kl_after"] == pytest.approx(one["heldout_forward_kl_after"], rel=1e-2)
    tokens = [json.loads((tmp_path / name / "samples" / "tokens_before.json").read_text()) for name in ("one", "two")]
    for answer, same in zip(tokens[0]["answers"], tokens[1]["answers"], strict=True):
        assert [token["id"] for token in same["tokens"]] == [token["id"] for token in answer["tokens"]]
        values = [token["forward_kl"] for token in answer["tokens"]]
        assert [token["forward_kl"] for token in same["tokens"]] == pytest.approx(values, rel=1e-4)
    profiles = [read_metrics(tmp_path / name, "heldout_positions.jsonl")[0] for name in ("one", "two")]
    assert profiles[1]["tokens"] == profiles[0]["tokens"]
    assert profiles[1]["forward_kl"] == pytest.approx(profiles[0]["forward_kl"], rel=1e-4)

    resumed = check(torchrun(2, ["-m", "gkd", "train", two, "run.steps=4", "optim.micro_batch_size=2", "--resume"]))
    assert "resumed at step 3" in resumed.stdout
    refused = run_gkd(["train", two, "optim.micro_batch_size=2", "run.steps=5", "--resume"])
    assert refused.returncode == 2 and "world_size was 2, is 1" in refused.stderr


@pytest.mark.slow
def test_packed_on_two_ranks_equals_padded_on_one(make_run_config: MakeConfig, tmp_path: Path) -> None:
    check(run_gkd(["train", make_run_config("padded")]))
    packed = make_run_config("packed", deepspeed={"zero_stage": 3}, student={"gradient_checkpointing": True})
    check(torchrun(2, ["-m", "gkd", "train", packed, "optim.micro_batch_tokens=80"]))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-3)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("padded", "packed"))
    assert other["heldout_forward_kl_before"] == pytest.approx(one["heldout_forward_kl_before"], rel=1e-5)


@pytest.mark.slow
def test_the_deepspeed_launcher(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config("launched", deepspeed={"zero_stage": 2}, run={"steps": 2})
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [deepspeed, "--num_gpus", "2", "--master_port", "29611", "--module", "gkd", "train", config]
    check(run([*command, "optim.micro_batch_size=2"], DS_ACCELERATOR="cpu"))
    assert len(losses(tmp_path / "launched")) == 2
