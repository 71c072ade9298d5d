"""What must hold for a step to count."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from gkd.errors import LossScaleError, MismatchError, NonFiniteError
from gkd.train.distributed import sum_over_ranks

_log = logging.getLogger(__name__)
_NAMED_SAMPLES = 8
WARNED_MISMATCH = 0.5  # nats, mean k3 of a step


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
        raise NonFiniteError(step, f"a loss or gradient is not finite {where}; the optimizer did not step")


class MismatchGuard:
    """Watches how far the sampler, from which a step's tokens came, is from the trainer.

    A student that was just cut out of its teacher has a mean k3 of about 0.4 in bfloat16, by rounding alone. Where a
    sampler's log-probabilities are of another model, temperature or version, it is tens to millions.
    """

    def __init__(self, limit: float = math.inf, advice: str = "") -> None:
        """`limit` is rollout.max_mismatch, `advice` what else may help, for messages."""
        self._limit, self._advice, self._has_warned = limit, advice, False

    def check(self, k3: float, step: int) -> None:
        """`k3` is the mean of the global batch, so that all ranks do the same: warn once, and raise MismatchError above
        the limit."""
        found = f"sampler and trainer disagree on the sampled tokens: mismatch/k3 is {k3:.3g} nats on average"
        if not k3 <= self._limit:  # a NaN must not pass
            raise MismatchError(
                step,
                f"{found}, more than rollout.max_mismatch = {self._limit:g}; the optimizer did not step. If the "
                f"sampler is as it should be, {self._advice}, or raise rollout.max_mismatch",
            )
        if k3 > WARNED_MISMATCH and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "step %d: %s; %s (said once; the run stops above rollout.max_mismatch = %g)",
                step, found, self._advice, self._limit,
            )  # fmt: skip


class LossScaleGuard:
    """Counts the steps that float16's loss scaling leaves out, one after another.

    A few are its way of finding a scale: each halves it. A run of fewer steps than the limit fails if all are left out.
    """

    def __init__(self, most: int, steps: int) -> None:
        self._most, self._left_out = min(most, steps), 0

    def check(self, grad_norm: float, step: int) -> None:
        """`grad_norm` is the same on all ranks, and not finite exactly where the step was left out. Raises
        LossScaleError."""
        self._left_out = 0 if math.isfinite(grad_norm) else self._left_out + 1
        if self._left_out >= self._most:
            raise LossScaleError(
                step,
                f"the gradients were infinite in each of the last {self._left_out} steps, which changed nothing; set "
                "student.dtype: bfloat16 or float32, let the loss scale of deepspeed.config start lower, or raise "
                "optim.max_skipped_steps",
            )
