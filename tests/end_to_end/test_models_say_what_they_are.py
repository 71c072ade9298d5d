"""Whole runs on models whose folders mislead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import MakeConfig, check, run_gkd
from tiny import claim_tied, save_tiny_model
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 60)[None]


def kl(first: Path, second: Path) -> float:
    """KL(first ‖ second) a token, nats."""
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits.log_softmax(-1)
            for folder in (first, second)
        )
    return (a.exp() * (a - b)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_result_keeps_the_head_that_its_student_has(
    make_run_config: MakeConfig, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    student = claim_tied(save_tiny_model(tmp_path / "own_head", seed=3, tied=False))
    config = make_run_config(
        "run", student={"model": str(student), "lora": lora}, run={"steps": 1}, optim={"lr": 1e-9, "warmup_steps": 0}
    )
    check(run_gkd(["train", config]))
    assert kl(student, tmp_path / "run" / "final") < 1e-6


@pytest.mark.slow
@pytest.mark.fault
def test_a_resume_names_everything_that_was_replaced(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """Under the same names: a row of the data, teacher, LoRA base and DeepSpeed JSON."""
    student, teacher = (save_tiny_model(tmp_path / name, seed=seed) for name, seed in (("s", 2), ("t", 1)))
    data, deepspeed = tmp_path / "train.jsonl", tmp_path / "deepspeed.json"
    data.write_text("".join(json.dumps({"prompt": f"row {i}", "completion": "yes"}) + "\n" for i in range(8)))
    deepspeed.write_text(json.dumps({"gradient_clipping": 1.0}))
    config = make_run_config(
        "run",
        student={"model": str(student), "lora": {"rank": 4}},
        teacher={"model": str(teacher)},
        data={"train": str(data), "heldout": None},
        run={"steps": 2, "save_every": 1},
        deepspeed={"config": str(deepspeed)},
    )
    check(run_gkd(["train", config, "run.steps=1"]))
    save_tiny_model(student, seed=12)
    save_tiny_model(teacher, seed=11)
    data.write_text(data.read_text().replace("row 3", "row x"))
    deepspeed.write_text(json.dumps({"gradient_clipping": 2.0}))
    refused = run_gkd(["train", config, "--resume"])
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "RunFolderError" in line]
    assert all(key in line for key in ("data.train was", "teacher.model was", "student.model was"))
    assert "deepspeed.config.gradient_clipping was 1.0, is 2.0" in line and "data.heldout" not in line
