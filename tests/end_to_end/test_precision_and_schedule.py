"""Runs whose DeepSpeed settings differ from the default ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import MakeConfig, check, read_metrics, run_gkd

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": 5},
    "data": {"heldout": None},
    "rollout": {"sync_tolerance": 1.0},
    "mixture": {"student": 0.0, "teacher": 0.0, "dataset": 1.0},
    "optim": {"lr": 1e-2, "warmup_steps": 0},
}


def losses_and_norms(run: Path) -> list[float]:
    return [record[key] for record in read_metrics(run) for key in ("loss", "grad_norm")]


def trained(make_run_config: MakeConfig, name: str, **sections: dict[str, Any]) -> list[float]:
    config = make_run_config(name, **SECTIONS, **sections)
    check(run_gkd(["train", config]))
    return losses_and_norms(config.parent / name)


needs_float16 = pytest.mark.skipif(  # as DeepSpeed asks
    not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    reason="this processor has no float16 instructions, without which DeepSpeed trains none",
)


@pytest.mark.slow
@needs_float16
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_float16_takes_the_steps_of_float32(
    finished_run: Callable[..., Path], make_run_config: MakeConfig, stage: int
) -> None:
    """Scaled losses, and gradients that are clipped once they are not scaled any more, sharded or not."""
    expected = losses_and_norms(finished_run(**SECTIONS))
    assert expected[-2] < 0.5 * expected[0]
    half = {"student": {"dtype": "float16"}, "deepspeed": {"zero_stage": stage}}
    assert trained(make_run_config, "half", **half) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.fault
@needs_float16
def test_a_loss_scale_that_overflows_costs_steps_and_not_the_run(make_run_config: MakeConfig, tmp_path: Path) -> None:
    settings = tmp_path / "deepspeed.json"
    fp16 = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}
    settings.write_text(json.dumps({"fp16": fp16, "zero_optimization": {"stage": 1}}))
    found = trained(make_run_config, "huge", student={"dtype": "float16"}, deepspeed={"config": str(settings)})
    norms = found[1::2]
    assert norms[0] is None and norms[-1] is not None and norms[-1] < 100, "left out at first, then none"


@pytest.mark.slow
@pytest.mark.fault
@needs_float16
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_a_loss_scale_that_never_recovers_stops_the_run(
    make_run_config: MakeConfig, tmp_path: Path, stage: int
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(
        json.dumps({"fp16": {"enabled": True, "loss_scale": 2**60}, "zero_optimization": {"stage": stage}})
    )
    sections = {**SECTIONS, "optim": {**SECTIONS["optim"], "max_skipped_steps": 3}}
    config = make_run_config("never", **sections, student={"dtype": "float16"}, deepspeed={"config": str(settings)})
    stopped = run_gkd(["train", config])
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    said = " ".join(stopped.stderr.split())
    assert "step 2: the gradients were infinite in each of the last 3 steps" in said and "student.dtype" in said
    assert not (tmp_path / "never" / "final").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="every GPU has float16")
def test_float16_on_a_processor_without_it_is_refused_in_one_line(make_run_config: MakeConfig) -> None:
    config = make_run_config("half", student={"dtype": "float16"}, deepspeed={"zero_stage": 1})
    refused = run_gkd(["train", config], ONEDNN_MAX_CPU_ISA="AVX2")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "student.dtype: DeepSpeed trains no float16 on this processor" in refused.stderr.replace("\n", " ")


@pytest.mark.slow
def test_the_schedule_is_the_runs_own_beside_an_optimizer_of_the_json(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}}}))
    optim = {"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"}
    objective = {"kind": "jsd"}
    config = make_run_config("json", deepspeed={"config": str(settings)}, optim=optim, objective=objective)
    check(run_gkd(["train", config, "data.heldout=null"]))
    records = read_metrics(tmp_path / "json")
    assert [record["lr"] for record in records] == pytest.approx([0.5e-3, 1e-3, 0.5e-3]), "of the step itself"
    assert all(0 < record["objective/jsd/loss"] < math.log(2) for record in records)
