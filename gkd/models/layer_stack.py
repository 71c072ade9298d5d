"""A language model's layers, called one at a time: the backbone does what comes before and after them.

Legend: R rows (variants of one text's states), T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gkd.errors import ModelError
from gkd.models.heads import backbone_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOLERANCE = 1e-3  # relative: the same products in other shapes, in half precision too


def layers_of(model: PreTrainedModel, config: PreTrainedConfig, key: str) -> nn.ModuleList:
    """The backbone's list of layers. Raises ModelError, starting with `key`, if it has none."""
    return getattr(*_place_of_layers(model, config, key))


def _place_of_layers(model: PreTrainedModel, config: PreTrainedConfig, key: str) -> tuple[nn.Module, str]:
    """The module that holds the list, and under which name."""
    count = config.get_text_config().num_hidden_layers
    for parent in backbone_of(model).modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name
    raise ModelError(f"{key}: {type(model).__name__} has no list of {count} layers; give a student.model instead")


@dataclass(frozen=True)
class Passage:
    """One text on its way through the whole model."""

    token_ids: torch.Tensor  # [1, T]
    states: list[torch.Tensor]  # [1, T, H]: what each layer reads, then what the last one writes
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]  # what each layer is called with beside its states
    final_states: torch.Tensor  # [1, T, H]: what the output head reads


class LayerStack:
    """The layers of a model in eval mode, in float32 between them.

    With weights in half precision the layers compute under autocast, as a student is trained: a cut model has states
    of 10^4, which half precision would round to whole numbers.
    """

    def __init__(self, model: PreTrainedModel, key: str) -> None:
        """Raises ModelError, starting with `key`, if the model has no list of layers."""
        self._backbone = backbone_of(model)
        self._parent, self._name = _place_of_layers(model, model.config, key)
        self._layers: nn.ModuleList = getattr(self._parent, self._name)
        self._key, self._device, self._dtype = key, model.device, model.dtype

    def __len__(self) -> int:
        return len(self._layers)

    def enter(self, token_ids: tuple[int, ...]) -> Passage:
        """A text through the whole model, kept at every layer.

        Raises ModelError where a layer, called alone, gives something else than in the model.
        """
        ids = torch.tensor([token_ids], device=self._device)
        states: list[torch.Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
            states.append(hidden)
            arguments.append((args, kwargs))
            return (hidden, *args), kwargs

        hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in self._layers]
        hooks.append(self._layers[-1].register_forward_hook(lambda _, __, output: states.append(_states(output))))
        try:
            final = self._run_backbone(ids)
        finally:
            for hook in hooks:
                hook.remove()
        passage = Passage(ids, states, arguments, final)
        self._verify(passage)
        return passage

    def run(self, layer: int, states: torch.Tensor, passage: Passage) -> torch.Tensor:
        """What a layer makes of `states` [R, T, H], each row a variant of the passage's text."""
        args, kwargs = passage.arguments[layer]
        with torch.no_grad(), self._autocast():
            return _states(self._layers[layer](states, *args, **kwargs))

    def leave(self, states: torch.Tensor, passage: Passage) -> torch.Tensor:
        """What the output head reads [R, T, H], of the last layer's `states`: the final norm, as a rule."""
        last = self._layers[-1]
        hook = last.register_forward_hook(lambda _, __, output: _with_states(output, states))
        setattr(self._parent, self._name, nn.ModuleList([last]))  # its own output is thrown away
        try:
            return self._run_backbone(passage.token_ids)
        finally:
            setattr(self._parent, self._name, self._layers)
            hook.remove()

    def _run_backbone(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self._autocast():
            return self._backbone(input_ids=ids, use_cache=False).last_hidden_state

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        halves = self._dtype.itemsize == 2
        with torch.autocast(self._device.type, self._dtype if halves else None, enabled=halves):
            yield

    def _verify(self, passage: Passage) -> None:
        states = passage.states[0]
        for layer in range(len(self)):
            states = self.run(layer, states, passage)
        error = (self.leave(states, passage) - passage.final_states).abs().max() / passage.final_states.abs().max()
        if not error <= _TOLERANCE:  # also where it is NaN
            raise ModelError(
                f"{self._key}: {type(self._backbone).__name__} with its layers called one by one gives other states "
                f"(by {error:.2g} of the largest); set student.init.choose to even, or list the layers"
            )


def states_read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The states that a layer is called with."""
    return _split(args, kwargs)[0]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The states that a layer is called with, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_states(output: Any, states: torch.Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states
