"""What a run writes is as large as planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_prompts

from gkd.config import make_config
from gkd.planning.devices import device_named
from gkd.planning.disk import checkpoint_bytes, result_bytes, run_folder_bytes
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.run_files import RunFiles
from gkd.train.distiller import Distiller


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path, tiny_student: Path, stage: int) -> None:
    """ZeRO 1 has weights of its own in the optimizer's state: a third more."""
    config = make_config(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": 1, "save_every": 1, "keep_checkpoints": 2},
            "teacher": {"model": str(tiny_student), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(save_prompts(tmp_path / "p.jsonl", 4)), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": 4},
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "deepspeed": {"zero_stage": stage},
        }
    )
    Distiller(config).train()
    setup = make_setup(config, *architectures(config), device_named("cpu"), 1)
    files = RunFiles(config.run.folder)
    written = sum(file.stat().st_size for file in files.checkpoints.rglob("*") if file.is_file())
    assert written == pytest.approx(checkpoint_bytes(setup), rel=0.06)
    assert (files.final / "model.safetensors").stat().st_size == pytest.approx(result_bytes(setup), rel=0.02)
    assert run_folder_bytes(config, setup) == 3 * checkpoint_bytes(setup) + result_bytes(setup)
