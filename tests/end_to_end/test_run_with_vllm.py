"""A whole run through real vLLM and DeepSpeed: what it writes, and that the result loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import MakeConfig, check, read_metrics, run_gkd
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIRED = {
    "step", "loss", "divergence/forward_kl", "tokens/scored", "tokens/generated", "time/sample_s", "time/score_s",
    "time/train_s", "time/sync_s", "mixture/student", "sync/max_logprob_error",
}  # fmt: skip


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_from_start_to_result(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config(
        rollout={"engine": "vllm"}, run={"steps": 6}, optim={"lr": 5e-3}, eval={"every": 2}, log={"tensorboard": True}
    )
    result = check(run_gkd(["train", config]))
    run = tmp_path / "tiny"

    records = read_metrics(run)
    assert [r["step"] for r in records] == list(range(6))
    assert all(r.keys() >= REQUIRED for r in records)
    assert all(r["sync/max_logprob_error"] < 1e-4 for r in records), "float32: exact to rounding"
    assert all(abs(r["mixture/student"] + r["mixture/teacher"] + r["mixture/dataset"] - 1) < 1e-9 for r in records)
    assert any(r["mixture/teacher"] > 0 for r in records) and any(r["mixture/dataset"] > 0 for r in records)
    assert [("heldout/forward_kl" in r) for r in records] == [False, True, False, True, False, False]
    assert all(r["time/step_s"] >= r["time/train_s"] + r["time/sample_s"] for r in records)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["wall_s"] > 0
    assert summary["heldout_forward_kl_after"] < summary["heldout_forward_kl_before"]
    assert (run / "samples.md").read_text().count("**Student after**") == 2
    assert list((run / "tensorboard").glob("events*"))
    for line in ("step 1/6", "step 6/6", "forward KL", "gkd generate"):
        assert line in result.stdout, line

    final = run / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(final).chat_template
    card = (final / "README.md").read_text()
    for text in ("forward_kl", "0.6", str(summary["heldout_forward_kl_after"])[:5]):
        assert text in card, text

    answers = check(run_gkd(["generate", final, "--prompt", "hello", "--dtype", "float32", "--max-new-tokens", "8"]))
    assert answers.stdout.startswith("> hello\n")

    evaluated = check(run_gkd(["eval", run / "config.resolved.json", "--only", "task", "--format", "json"]))
    forward_kl = json.loads(evaluated.stdout.splitlines()[-1])["task"]["figures"]["forward_kl"]
    for column in ("before", "after"):
        value = forward_kl[f"student_{column}"]["value"]
        assert value == pytest.approx(summary[f"heldout_forward_kl_{column}"], rel=1e-4)

    refused = run_gkd(["train", config])
    assert refused.returncode == 2 and "holds a run; continue it with --resume" in refused.stderr
