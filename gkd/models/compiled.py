"""Decoder layers through torch.compile, each alone.

The layers of a decoder are the same code, so they share one graph, which is compiled once for any batch and length; the
whole model would take minutes, and again for another length. Only training runs it: where no gradient is asked for
(proofs, evaluation), layers run as they are.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from gkd.environment import CXX_COMPILERS
from gkd.errors import ConfigError
from gkd.models.heads import backbone_of
from gkd.models.layer_stack import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


def why_not_compiled(device_type: str) -> str | None:
    """What keeps torch.compile from working in this process; None if nothing is known to."""
    for name in _SWITCHES:
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name} is set"
    if device_type == "cpu":
        return None if any(map(shutil.which, CXX_COMPILERS)) else f"none of {', '.join(CXX_COMPILERS)} is in PATH"
    from torch.utils._triton import has_triton

    return None if has_triton() else "triton is not installed"


def compile_layers(model: PreTrainedModel, key: str) -> None:
    """In place; names of parameters stay. Nothing is compiled before the first forward.

    Raises ModelError, starting with `key`, for a model without a list of layers, and ConfigError where it cannot work.
    """
    reason = why_not_compiled(model.device.type)
    if reason is not None:
        raise ConfigError(f"{key}: torch.compile does not work here: {reason}; set it to false")
    for layer in layers_of(model, model.config, key):
        layer.compile(dynamic=True)


def only_in_training() -> AbstractContextManager[Any]:
    """Compiled layers run as they are where no gradient is asked for."""
    return nullcontext() if torch.is_grad_enabled() else torch.compiler.set_stance("force_eager")


def warm_up(model: Any, rows: int, tokens: int, dtype: torch.dtype | None) -> float:
    """Compiles the layers of `model`, forward and backward, on `rows` sequences of `tokens` tokens; the seconds taken.

    Always on the same shape, that of the largest micro-batch: what the compiler makes of a graph depends on the first
    shape it sees, and a resume shall get the same. `dtype`: of autocast. No parameter has a gradient afterwards, and
    no hook of DeepSpeed's saw one.
    """
    started = time.perf_counter()
    device = model.device
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        states = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(states.float().sum(), trained, allow_unused=True)
    return time.perf_counter() - started
