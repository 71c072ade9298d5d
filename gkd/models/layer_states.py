"""States of single layers, read while a backbone computes.

Legend: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from gkd.models.layer_stack import layers_of, states_read
from gkd.models.load import empty_model
from gkd.types import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def model_shape(config: PreTrainedConfig, key: str) -> ModelShape:
    """Of the architecture of a config. Raises ModelError, starting with `key`, if it has no list of layers."""
    return ModelShape(len(layers_of(empty_model(config), config, key)), config.get_text_config().hidden_size)


class StateReader:
    """Calls a backbone, and keeps what its layers read meanwhile.

    Hooks are there during a call alone, and do nothing but keep: a layer that is computed again in the backward pass
    does so without them.
    """

    def __init__(self, model: PreTrainedModel, key: str) -> None:
        """Raises ModelError, starting with `key`, if the model has no list of layers."""
        self._layers: nn.ModuleList = layers_of(model, model.config, key)

    def call(
        self, backbone: Callable[..., Any], layers: Collection[int], **inputs: Any
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last states [B, T, H], and those of `layers` by number, which is that of `StatePlace`."""
        found: dict[int, torch.Tensor] = {}

        def keep(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[number] = states_read(args, kwargs)

            return hook

        inner = [number for number in layers if number < len(self._layers)]
        hooks = [self._layers[number].register_forward_pre_hook(keep(number), with_kwargs=True) for number in inner]
        try:
            last = backbone(**inputs, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if len(self._layers) in layers:
            found[len(self._layers)] = last
        return last, found
