"""Memory for the temporaries of a loss, which on a CPU one call leaves to the next.

torch frees a large block of a CPU's memory back to the system at once, and the system clears it before it hands it out
again: seen here, a third of the time of `linear_divergence` where other work takes memory in between. What is kept is
what the largest call needed, two chunks of logits; `release` gives it up. A GPU's allocator does the same by itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from gkd.ops.common import working_memory

_MOST_KEPT = 2
_kept: list[torch.UntypedStorage] = []
_lock = threading.Lock()


def take(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; `give_back` it when nothing needs what is in it."""
    probe = torch.empty(0, dtype=dtype, device=device)
    if _is_kept(probe):
        storage = _find(math.prod(shape) * dtype.itemsize)
        if storage is not None:
            return probe.set_(storage, 0, tuple(shape), [math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
    return working_memory(shape, dtype, device)


def give_back(*tensors: Tensor) -> None:
    """Of tensors that `take` returned. Whoever still has one sees the next call write to it."""
    for tensor in tensors:
        if _is_kept(tensor):
            with _lock:
                if len(_kept) < _MOST_KEPT:
                    _kept.append(tensor.untyped_storage())


def release() -> None:
    """Gives all that is kept back to the system."""
    with _lock:
        _kept.clear()


def _is_kept(tensor: Tensor) -> bool:
    """Not what stands for a tensor while a graph is traced."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def _find(n_bytes: int) -> torch.UntypedStorage | None:
    """One that is large enough, now the caller's alone. Those that are too small are given up."""
    with _lock:
        for index, storage in enumerate(_kept):
            if storage.nbytes() >= n_bytes:
                return _kept.pop(index)
        _kept.clear()
    return None
