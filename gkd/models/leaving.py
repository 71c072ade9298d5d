"""What leaves the trainer: weights by transformers' names, adapters merged and quantized ones rounded; adapters alone;
and the scales of quantized weights. Each is made of parameters that may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from gkd.models.lora import adapter_parameters, base_name, is_adapted, is_adapter, merged, scaling_of
from gkd.models.quantization import quantized_modules

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LeavingWeight:
    """A tensor that leaves the trainer, and how it is made of parameters that may be sharded."""

    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    value: Callable[..., torch.Tensor]  # of the parameters' whole tensors, in their order


def whole_weights(model: nn.Module) -> dict[str, LeavingWeight]:
    """What leaves of the model as one without adapters: by transformers' names, a tied head once.

    An adapted matrix is merged in float32 each time it is asked for; the base is never changed, so nothing drifts. A
    quantized one is rounded, in float32.
    """
    weights: dict[str, LeavingWeight] = {}
    quantized = quantized_modules(model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if is_adapted(name):
            layer: Any = model.get_submodule(name.removesuffix(".base_layer.weight"))  # peft's
            parts = (parameter, *(p for part, p in layer.named_parameters() if is_adapter(f".{part}")))
            weights[base_name(name)] = LeavingWeight(shape, parts, partial(merged, scaling_of(layer)))
        elif name in quantized:
            weights[name] = LeavingWeight(shape, (parameter,), quantized[name].quantization.rounded)
        elif not is_adapter(name):
            weights[base_name(name)] = _plain(parameter)
    return weights


def weight_scales(model: nn.Module) -> dict[str, LeavingWeight]:
    """The scales of each quantized weight, [O, G], by the weight's name; none of a model without any."""
    return {
        name: LeavingWeight(
            (module.out_features, module.in_features // module.quantization.group_size),
            (cast("nn.Parameter", module.weight),),
            module.quantization.scales,
        )
        for name, module in quantized_modules(model).items()
    }


def adapter_weights(model: nn.Module) -> dict[str, LeavingWeight]:
    """What leaves of the adapter alone."""
    return {name: _plain(parameter) for name, parameter in adapter_parameters(model).items()}


def _plain(parameter: nn.Parameter) -> LeavingWeight:
    return LeavingWeight(tuple(parameter.shape), (parameter,), lambda whole: whole)
