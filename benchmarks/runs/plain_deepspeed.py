"""What of DeepSpeed a run on one device calls, in plain PyTorch, for machines where DeepSpeed is not installed.

A benchmark's means: `install()` puts it under DeepSpeed's name into this process, so that the whole real run goes on
above it. Autocast over float32 weights, one process, no sharding, no loss scaling, no checkpoints.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class PlainEngine:
    """The methods of a DeepSpeed engine that `gkd.train.engine` calls."""

    torch_autocast_z0_gradscaler = None  # float16 is not for this engine

    def __init__(self, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any, config: dict[str, Any]) -> None:
        self.module = model
        self._optimizer, self._schedule = optimizer, lr_scheduler(optimizer)
        self._max_grad_norm = config["gradient_clipping"]
        autocast = config.get("torch_autocast", {})
        self._dtype = getattr(torch, autocast["dtype"]) if autocast.get("enabled") else None
        self._is_boundary = True

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype is not None):
            return self.module(*inputs, **named)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_boundary = is_boundary

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        del scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        if not self._is_boundary:
            return
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def get_lr(self) -> list[float]:
        return self._schedule.get_last_lr()

    def zero_optimization(self) -> bool:
        return False

    zero_optimization_partition_weights = fp16_enabled = bfloat16_enabled = zero_optimization


def initialize(
    *, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any, config: dict[str, Any], **sharding: Any
) -> tuple[PlainEngine]:
    del sharding  # what DeepSpeed has to know of processes and partitions
    return (PlainEngine(model, optimizer, lr_scheduler, config),)


def install() -> None:
    """`import deepspeed` finds this file's parts from now on. For one process only."""
    assert int(os.environ.get("WORLD_SIZE", "1")) == 1
    stand_in: Any = ModuleType("deepspeed")
    stand_in.__spec__ = ModuleSpec("deepspeed", None)  # transformers looks whether there is one
    stand_in.DeepSpeedEngine = PlainEngine  # accelerate asks whether a model is one
    stand_in.initialize = initialize
    stand_in.init_distributed = lambda **_: None
    stand_in.ops = SimpleNamespace(__compatible_ops__={})
    config: Any = ModuleType("deepspeed.runtime.config")
    config.DeepSpeedConfigError = ValueError  # nothing here raises it
    sys.modules |= {
        "deepspeed": stand_in,
        "deepspeed.runtime": ModuleType("deepspeed.runtime"),
        config.__name__: config,
    }
