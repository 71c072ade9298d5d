"""What must hold before the optimizer is allowed to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gkd.errors import NonFiniteError
from gkd.train.distributed import sum_over_ranks

_NAMED_SAMPLES = 8


class FiniteGuard:
    """Watches every gradient of a step, micro-batch by micro-batch, before DeepSpeed reduces or frees it.

    One flag a step: the sum of (gradient sums x 0), which is NaN if anything was NaN or infinite, and costs one
    read of each gradient and no synchronisation until `check`. Off for float16, whose loss scaling expects
    overflows and skips those steps itself.
    """

    def __init__(self, module: nn.Module, *, enabled: bool) -> None:
        self._flag: torch.Tensor | None = None
        if enabled:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._watch)

    def _watch(self, gradient: torch.Tensor) -> None:
        poison = gradient.detach().sum(dtype=torch.float32) * 0.0
        self._flag = poison if self._flag is None else self._flag + poison

    def check(self, sums: torch.Tensor, sample_ids: Sequence[str], step: int) -> None:
        """Raises NonFiniteError on all ranks if this step's loss or gradients are not finite on any.

        `sums[0]` is the step's loss on this rank; the message of the rank at fault names its samples.
        """
        local = sums[0] * 0.0 if self._flag is None else sums[0] * 0.0 + self._flag
        self._flag = None
        bad_here = (~torch.isfinite(local)).to(torch.float64)
        if sum_over_ranks(bad_here.clone()).item() == 0:
            return
        where = "on another rank"
        if bad_here.item():
            names = ", ".join(sample_ids[:_NAMED_SAMPLES])
            where = f"on this rank, in one of: {names}" + (", ..." if len(sample_ids) > _NAMED_SAMPLES else "")
        raise NonFiniteError(f"step {step}: a loss or gradient is not finite {where}; the optimizer did not step")
