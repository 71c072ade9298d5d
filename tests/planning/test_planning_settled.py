"""What a sampler takes of a GPU's memory, by the memory model that `gkd plan` prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned import PLANNED, setup_of

from gkd.config import Config, load_config, make_config
from gkd.planning import settled
from gkd.planning.memory import memory_plan
from gkd.planning.models import SHIPPED_FOLDER
from gkd.planning.setup import Setup
from gkd.processor import Processor

SMALL = "qwen3_8b_to_1.7b"
SHARE, LEVEL = "rollout.gpu_memory_utilization", "rollout.sleep_level"
H200 = Processor("H200", (9, 0), memory_bytes=141_000_000_000)


def planned(*overrides: str, gpu: str = "h100", **options: Any) -> Setup:
    return setup_of(SMALL, 8, f"{SHARE}=auto", *overrides, gpu=gpu, **options)


@pytest.mark.parametrize(
    ("gpu", "level", "share"), [("h200", 0, 0.3), ("b200", 0, 0.3), ("h100", 2, 0.38), ("a100-80", 2, 0.38)]
)
def test_a_share_that_holds_a_step_and_a_sleep_only_where_that_needs_it(gpu: str, level: int, share: float) -> None:
    setup = planned(gpu=gpu)
    plan = memory_plan(setup)
    assert (setup.sleep_level, setup.sampler_memory_share) == (level, share)
    assert plan.fits and plan.sequences_at_once >= 64
    left = plan.limit_bytes - plan.peak_bytes
    assert left >= settled.MARGIN_SHARE * setup.device.memory_bytes
    if level:
        awake = memory_plan(replace(setup, sleep_level=0))
        assert awake.limit_bytes - awake.peak_bytes < settled.MARGIN_SHARE * setup.device.memory_bytes


def test_what_is_said_of_one_decides_the_other() -> None:
    assert planned(f"{LEVEL}=0").sleep_level == 0
    assert planned(f"{LEVEL}=0").sampler_memory_share < planned().sampler_memory_share
    assert planned(f"{LEVEL}=1").sampler_memory_share == planned().sampler_memory_share
    assert setup_of(SMALL, 8, f"{SHARE}=0.2").sleep_level == 0
    assert setup_of(SMALL, 8, f"{SHARE}=0.45").sleep_level == 2, "at level 0 it would not fit"


def test_an_adapter_leaves_the_frozen_weights_where_they_can_wait() -> None:
    setup = planned("student.lora.rank=16", "optim.micro_batch_size=32")
    assert setup.sampler_applies_adapter
    assert setup.sleep_level == 1


def test_what_does_not_fit_anyway_stays_and_is_said() -> None:
    setup = planned("optim.micro_batch_size=64", "student.gradient_checkpointing=false")
    assert (setup.sampler_memory_share, setup.sleep_level) == (0.3, 0)
    assert any("do not fit beside one another; see gkd plan" in line for line in setup.settled_lines)


def config(**teacher: Any) -> Config:
    folder = SHIPPED_FOLDER
    values = load_config(PLANNED / f"{SMALL}.yaml").model_dump()
    values["rollout"] |= {"gpu_memory_utilization": "auto", "sleep_level": "auto", "enforce_eager": False}
    values["rollout"]["max_num_seqs"] = 64
    assert folder.is_dir()
    values["teacher"] |= {"dtype": "bfloat16", **teacher}
    values["student"]["dtype"] = "bfloat16"
    return make_config(values)


def test_a_run_decides_as_the_plan_of_it(tmp_path: Path) -> None:
    here = settled._memory_of_run(config(), H200, ranks=8)
    plan = planned(gpu="h200")
    assert (here[SHARE].value, here[LEVEL].value) == (plan.sampler_memory_share, plan.sleep_level)
    assert f"{SHARE}: {here[SHARE].value}, by auto: {here[SHARE].reason}" in plan.settled_lines
    unknown = settled._memory_of_run(config(model=str(tmp_path)), H200, ranks=8)
    assert (unknown[SHARE].value, unknown[LEVEL].value) == (0.3, 0)
    assert unknown[SHARE].reason.startswith("what the run needs is not planned for (teacher.model: ")
