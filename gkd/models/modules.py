"""Linear modules of a model as configs name them, and what is in none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matches(name: str, target: str) -> bool:
    """Whether a config that says `target` means the module `name`."""
    return name == target or name.endswith(f".{target}")


def kinds_of(names: Iterable[str], parts: int) -> list[str]:
    """The last `parts` of each name, once."""
    return list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))


def fused_experts(model: PreTrainedModel) -> tuple[list[str], float]:
    """Matrices of experts that lie in one tensor a layer, which is no linear module: their kinds, and their share of
    the model's parameters. `model` may be on the meta device."""
    from torch import nn

    known = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    fused = {
        f"{name}.{part}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, known)
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    }
    return kinds_of(fused, 2), sum(fused.values()) / sum(parameter.numel() for parameter in model.parameters())
