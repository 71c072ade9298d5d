"""The end-to-end benchmark, small: the real loop above DeepSpeed and above its plain stand-in."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def measured(folder: Path, *options: str) -> dict[str, Any]:
    record = folder / "record.json"
    command = [sys.executable, "benchmarks/end_to_end.py", "--size", "tiny", "--steps", "4", "--transformers"]
    done = subprocess.run([*command, *options, "--out", str(record)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
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
        assert 0 < record["share_of_matmul_rate"] < 1


def test_a_batch_has_enough_prompts_however_short_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    end_to_end = importlib.import_module("end_to_end")
    size = end_to_end.Size(2, 64, 512, batch_size=64, micro_batch_size=8, max_prompt_tokens=48, max_new_tokens=2)
    end_to_end.run_config(size, tmp_path / "teacher", tmp_path / "run", "transformers", 1)
    assert len(set((tmp_path / "prompts.jsonl").read_text().splitlines())) == 64
