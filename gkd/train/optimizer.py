"""AdamW and its learning rate."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from gkd.config import OptimConfig


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as norms and biases do not overfit."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(lr_factor, schedule=config.schedule, warmup_steps=config.warmup_steps, steps=steps)
    )


def lr_factor(step: int, *, schedule: str, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear warm-up whose first step is not 0, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
