"""Learning rate and weight decay."""

from __future__ import annotations

import pytest
import torch

from gkd.config import OptimConfig
from gkd.train.optimizer import lr_factor, make_optimizer, make_schedule


def factors(schedule: str, warmup_steps: int, steps: int) -> list[float]:
    return [lr_factor(step, schedule=schedule, warmup_steps=warmup_steps, steps=steps) for step in range(steps)]


def test_warm_up_starts_above_zero_and_ends_at_the_peak() -> None:
    assert factors("constant", 3, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_decays() -> None:
    assert factors("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert factors("cosine", 0, 4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert lr_factor(9, schedule="linear", warmup_steps=0, steps=4) == 0.0


def test_weight_decay_spares_vectors_and_the_schedule_drives_all_groups() -> None:
    module = torch.nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, weight_decay=0.5, warmup_steps=1)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(module, config)
    assert {tuple(g["params"][0].shape): g["weight_decay"] for g in optimizer.param_groups} == {(2, 3): 0.5, (2,): 0.0}
    schedule = make_schedule(optimizer, config, steps=4)
    assert schedule.get_last_lr() == [0.05, 0.05]
