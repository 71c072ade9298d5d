"""The end-to-end benchmark, small: the real loop above DeepSpeed and above its plain stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import check, run_python

from benchmarks.runs.random_model import Size, run_config


def measured(folder: Path, *options: str) -> dict[str, Any]:
    record = folder / "record.json"
    command = ["-m", "benchmarks.runs.end_to_end", "--size", "tiny", "--steps", "4", "--transformers"]
    check(run_python([*command, *options, "--out", record]))
    return json.loads(record.read_text())


@pytest.mark.slow
def test_plain_pytorch_under_deepspeeds_name_takes_the_same_steps(tmp_path: Path) -> None:
    whole, plain = measured(tmp_path), measured(tmp_path, "--plain")
    assert (whole["optimizer"], plain["optimizer"]) == ("DeepSpeed", "plain PyTorch")
    assert plain["losses"] == pytest.approx(whole["losses"], rel=1e-6) and len(plain["losses"]) == 2
    for record in (whole, plain):
        phases = {name: seconds for name, seconds in record["seconds"].items() if name != "step"}
        assert sum(phases.values()) == pytest.approx(record["seconds"]["step"], rel=0.5) and min(phases.values()) > 0
        assert record["peak_bytes"] > record["planned_peak_bytes"] > 0  # libraries are not planned for
        assert record["share_of_matmul_rate"] > 0
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # without, gkd multiplies in float32, which is faster there
            assert record["share_of_matmul_rate"] < 1


def test_a_batch_has_enough_prompts_however_short_they_are(tmp_path: Path) -> None:
    size = Size(2, 64, 512, batch_size=64, micro_batch_size=8, max_prompt_tokens=48, max_new_tokens=2)
    run_config(size, tmp_path / "teacher", tmp_path / "run", "transformers", 1)
    assert len(set((tmp_path / "prompts.jsonl").read_text().splitlines())) == 64
