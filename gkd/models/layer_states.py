"""States of single layers, read while a backbone computes.

Legend: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from gkd.models.layer_stack import layers_of, states_read
from gkd.models.load import empty_model
from gkd.types import LayerOutput, ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedConfig, PreTrainedModel


_PROJECTIONS: dict[LayerOutput, str] = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
Source = tuple[LayerOutput, int]  # of `StatePlace`


def model_shape(config: PreTrainedConfig, key: str) -> ModelShape:
    """Of the architecture of a config. Raises ModelError, starting with `key`, if it has no list of layers."""
    layers = layers_of(empty_model(config), config, key)
    widths = {tuple(_width(layer, name) for name in _PROJECTIONS.values()) for layer in layers}
    query, key_, value = widths.pop()
    projections = (query, key_, value) if query and key_ and value and not widths else None
    return ModelShape(len(layers), config.get_text_config().hidden_size, projections)


def _projection(layer: nn.Module, name: str) -> Any:
    return getattr(getattr(layer, "self_attn", None), name, None)


def _width(layer: nn.Module, name: str) -> int:
    """0 where there is no such projection."""
    return getattr(_projection(layer, name), "out_features", 0)


class StateReader:
    """Calls a backbone, and keeps what its layers read, or their projections give, meanwhile.

    Hooks are there during a call alone, and do nothing but keep: a layer that is computed again in the backward pass
    does so without them.
    """

    def __init__(self, model: PreTrainedModel, key: str) -> None:
        """Raises ModelError, starting with `key`, if the model has no list of layers."""
        self._layers: nn.ModuleList = layers_of(model, model.config, key)

    def call(
        self, backbone: Callable[..., Any], sources: Collection[Source], **inputs: Any
    ) -> tuple[torch.Tensor, dict[Source, torch.Tensor]]:
        """The last states [B, T, H], and those of `sources`."""
        found: dict[Source, torch.Tensor] = {}
        last_source: Source = ("hidden", len(self._layers))
        hooks = [self._keep(source, found) for source in sources if source != last_source]
        try:
            last = backbone(**inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if last_source in sources:
            found[last_source] = last
        return last, found

    def _keep(self, source: Source, found: dict[Source, torch.Tensor]) -> RemovableHandle:
        output, layer = source

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[source] = states_read(args, kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
            found[source] = result

        if output == "hidden":
            return self._layers[layer].register_forward_pre_hook(before, with_kwargs=True)
        return _projection(self._layers[layer - 1], _PROJECTIONS[output]).register_forward_hook(after)
