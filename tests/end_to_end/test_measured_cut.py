"""A student whose layers a run chooses by measuring, however many ranks it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import MakeConfig, check, run_gkd, torchrun

INIT = {"layers": 2, "choose": "divergence", "calibration_tokens": 96}


@pytest.mark.slow
def test_two_ranks_choose_what_one_chooses_and_a_resume_keeps_it(make_run_config: MakeConfig, tmp_path: Path) -> None:
    sections = {"student": {"model": None, "init": INIT}, "run": {"steps": 1, "save_every": 1}}
    one, two = (make_run_config(name, **sections) for name in ("one", "two"))
    alone = check(run_gkd(["train", one], GKD_CACHE=str(tmp_path / "cache1")))
    together = check(torchrun(2, ["-m", "gkd", "train", two], GKD_CACHE=str(tmp_path / "cache2")))
    assert "without layer" in alone.stderr and together.stderr.count("measuring the 4 layers") == 1
    for name in ("student_init.json", "model.safetensors", "config.json"):
        files = [tmp_path / run / "student_init" / name for run in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    kept = json.loads((tmp_path / "one" / "student_init" / "student_init.json").read_text())["layers"]
    assert f"divergence keeps layers {kept} of 4" in alone.stderr

    resumed = check(run_gkd(["train", one, "run.steps=2", "--resume"], GKD_CACHE=str(tmp_path / "cache3")))
    assert "resumed at step 1" in resumed.stdout and "measuring the" not in resumed.stderr
