"""Whole runs on models whose folders mislead."""

from __future__ import annotations

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
