"""A model made narrower: fewer channels of the residual stream, attention heads, and neurons of the MLPs.

What is kept is what a few texts use most (Minitron, arXiv 2407.14679, section 2.2), measured on the whole model:

    neurons   |input of down_proj|, layer by layer
    heads     Euclidean norm of a query head's output, layer by layer; a key-value head counts what its query heads do
    channels  |output of every norm|, summed over the norms: the same channels in all layers

each as the mean over a text's tokens, then the Euclidean norm over the texts. For the Llama, Qwen and Gemma families.

A norm divides by the root mean square of all channels. Of the H' that are kept it is larger by about sqrt(H / H'), as
the others were small; the norms' weights are multiplied by that, so that what is kept keeps its size.

Legend: H hidden size, D size of an attention head, T positions.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gkd.config import StudentWidth
from gkd.errors import ConfigError, ModelError
from gkd.files import write_json
from gkd.models.attention import use_short_attention
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.heads import backbone_of
from gkd.models.layer_stack import layers_of
from gkd.models.load import empty_model, load_causal_lm, read_config
from gkd.models.subset import RECORD_FILE
from gkd.models.weight_files import check_model_folder
from gkd.models.weights import read_tensors, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)
_KEY = "student.init.width"
_LAYER = re.compile(r"\.(\d+)\.")
_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm",
)  # fmt: skip
_AXES: dict[str, tuple[str | None, ...]] = {  # what lies along the axes of a module's weight; a bias has the first
    "embed_tokens": (None, "hidden"),
    "lm_head": (None, "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
    "q_norm": (None,),
    "k_norm": (None,),
    **dict.fromkeys(_NORMS, ("hidden",)),
}
Kept = tuple[int, ...]


@dataclass(frozen=True)
class WidthChoice:
    """What stays, in rising order; of heads and neurons layer by layer. None where all of it does."""

    hidden: Kept | None = None
    heads: tuple[Kept, ...] | None = None
    kv_heads: tuple[Kept, ...] | None = None
    ffn: tuple[Kept, ...] | None = None

    def along(self, axis: str, layer: int | None) -> Kept | None:
        if axis == "hidden":
            return self.hidden
        kept = {"heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}[axis]
        return None if kept is None or layer is None else kept[layer]

    def as_record(self) -> dict[str, Any]:
        """Plain values for JSON, each list of numbers as ranges: "0-3,7"; `from_record` reads them."""
        return {
            "hidden": None if self.hidden is None else _as_ranges(self.hidden),
            **{
                axis: None if kept is None else [_as_ranges(one) for one in kept]
                for axis, kept in (("heads", self.heads), ("kv_heads", self.kv_heads), ("ffn", self.ffn))
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> WidthChoice:
        """Raises KeyError, TypeError, ValueError or AttributeError for anything else than such a record."""
        hidden = record["hidden"]
        layered = {
            axis: None if record[axis] is None else tuple(_from_ranges(text) for text in record[axis])
            for axis in ("heads", "kv_heads", "ffn")
        }
        return cls(hidden=None if hidden is None else _from_ranges(hidden), **layered)


def _as_ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def _from_ranges(text: str) -> Kept:
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


# ---- sizes


def narrow_config(config: PreTrainedConfig, width: StudentWidth) -> PreTrainedConfig:
    """`config` with the sizes of `width`.

    Raises ConfigError, naming the key, for sizes that do not fit, and ModelError for an architecture that has other
    modules than those of Llama, Qwen and Gemma.
    """
    for name, _ in empty_model(config).named_parameters():
        _axes_of(name)  # before sizes are asked for that another family does not have
    whole = width_sizes(config)
    sizes = width.of(**whole)
    head_dim = _head_dim(config)
    narrow = type(config).from_dict(config.to_dict())
    text_config = narrow.get_text_config()
    text_config.hidden_size, text_config.intermediate_size = sizes["hidden"], sizes["ffn"]
    text_config.num_attention_heads, text_config.num_key_value_heads = sizes["heads"], sizes["kv_heads"]
    text_config.head_dim = head_dim  # it no longer follows from the other two
    _check_valid(narrow)
    _check_shapes(config, narrow, whole, sizes)
    return narrow


def _check_valid(config: PreTrainedConfig) -> None:
    """What transformers itself asks of the sizes of a family: a hidden size that the heads divide, say."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.get_text_config().validate()
    except StrictDataclassError as error:
        raise ConfigError(f"{_KEY}: {type(config).__name__} takes no such sizes: {error.__cause__ or error}") from None


def width_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """hidden, heads, kv_heads and ffn, as `StudentWidth` names them."""
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    return {
        "hidden": text_config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(text_config, "num_key_value_heads", None) or heads,
        "ffn": text_config.intermediate_size,
    }


def _head_dim(config: PreTrainedConfig) -> int:
    text_config = config.get_text_config()
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _check_shapes(
    config: PreTrainedConfig, narrow: PreTrainedConfig, before: Mapping[str, int], after: Mapping[str, int]
) -> None:
    """That the narrow architecture has the parameters that the cut will leave."""
    head_dim = _head_dim(config)
    found = {name: tuple(parameter.shape) for name, parameter in empty_model(narrow).named_parameters()}
    for name, parameter in empty_model(config).named_parameters():
        expected = list(parameter.shape)
        for place, axis in enumerate(_axes_of(name)):
            if axis is not None:
                if expected[place] != before[axis] * _places(axis, head_dim):
                    raise ModelError(_unfit(config, f"{name} has {expected[place]} {axis}, not {before[axis]}"))
                expected[place] = after[axis] * _places(axis, head_dim)
        if found.get(name) != tuple(expected):
            raise ModelError(
                _unfit(config, f"{name} would be {found.get(name)}, where the cut leaves {tuple(expected)}")
            )


def _places(axis: str, head_dim: int) -> int:
    """That one of it takes along a tensor's axis."""
    return head_dim if axis in ("heads", "kv_heads") else 1


def _unfit(config: PreTrainedConfig, why: str) -> str:
    return f"{_KEY}: {type(config).__name__} cannot be made narrower: {why}; give a student.model instead"


def _axes_of(name: str) -> tuple[str | None, ...]:
    """Of the parameter's own axes. Raises ModelError for a module that is none of a Llama's."""
    *_, module, kind = name.split(".")
    if module not in _AXES or kind not in ("weight", "bias"):
        raise ModelError(
            f"{_KEY}: {name} is in no Llama, Qwen or Gemma; only their families can be made narrower: give a "
            "student.model instead"
        )
    return _AXES[module] if kind == "weight" else _AXES[module][:1]


# ---- choosing


def choose_width(
    folder: Path, width: StudentWidth, texts: Sequence[tuple[int, ...]], *, dtype: str, device: torch.device
) -> WidthChoice:
    """What `width` leaves of the model in `folder`, measured on `texts` (token ids). Raises as `narrow_config`."""
    config = read_config(str(folder), key=_KEY)
    before, after = width_sizes(config), width_sizes(narrow_config(config, width))
    model = load_causal_lm(str(folder), dtype, key=_KEY)
    use_short_attention(model)
    _log.info("measuring the width of %s on %d tokens", folder, sum(map(len, texts)))
    use = _Use(model.to(device), _head_dim(config))  # pyright: ignore[reportArgumentType]  its stub lacks `to`
    for ids in texts:
        use.read(ids)
    changed = {axis for axis in before if before[axis] != after[axis]}
    groups = [_groups(layer, before["kv_heads"], after["heads"], after["kv_heads"]) for layer in use.heads()]
    return WidthChoice(
        hidden=_largest(use.channels(), after["hidden"]) if "hidden" in changed else None,
        heads=tuple(heads for heads, _ in groups) if "heads" in changed else None,
        kv_heads=tuple(kv_heads for _, kv_heads in groups) if "kv_heads" in changed else None,
        ffn=tuple(_largest(layer, after["ffn"]) for layer in use.neurons()) if "ffn" in changed else None,
    )


def _largest(importance: torch.Tensor, count: int) -> Kept:
    return tuple(sorted(importance.topk(count).indices.tolist()))


def _groups(importance: torch.Tensor, groups: int, kept_heads: int, kept_groups: int) -> tuple[Kept, Kept]:
    """A layer's query heads and key-value heads that stay; a query head stays with its own. `importance` [heads]."""
    by_group = importance.reshape(groups, -1)  # [groups, query heads of each]
    size = by_group.shape[1]
    kv_heads = _largest(by_group.sum(1), kept_groups)
    heads = (group * size + head for group in kv_heads for head in _largest(by_group[group], kept_heads // kept_groups))
    return tuple(heads), kv_heads


class _Use:
    """What texts make of a model's neurons, heads and channels: sums of squares over the texts, on the CPU."""

    def __init__(self, model: PreTrainedModel, head_dim: int) -> None:
        self._model, self._head_dim = model, head_dim
        self._layers = layers_of(model, model.config, _KEY)
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def read(self, ids: tuple[int, ...]) -> None:
        """One text through the backbone, watched."""
        backbone = backbone_of(self._model)
        with ExitStack() as hooks:
            for name, module in backbone.named_modules():
                kind = name.rpartition(".")[2]
                watch = self._watch(name, kind)
                if kind in _NORMS:
                    handle = module.register_forward_hook(lambda _, __, states, watch=watch: watch(states))
                elif kind in ("o_proj", "down_proj"):
                    handle = module.register_forward_pre_hook(lambda _, args, watch=watch: watch(args[0]))
                else:
                    continue
                hooks.callback(handle.remove)
            backbone(input_ids=torch.tensor([ids], device=self._model.device), use_cache=False)

    def _watch(self, name: str, kind: str) -> Callable[[torch.Tensor], None]:
        def watch(states: torch.Tensor) -> None:
            states = states[0].float()  # [T, size]
            size = states.unflatten(-1, (-1, self._head_dim)).norm(dim=-1) if kind == "o_proj" else states.abs()
            square = size.mean(0).double().cpu().square()
            self._sums[name] = self._sums.get(name, 0.0) + square

        return watch

    def neurons(self) -> list[torch.Tensor]:
        return self._of_layers("down_proj")

    def heads(self) -> list[torch.Tensor]:
        return self._of_layers("o_proj")

    def channels(self) -> torch.Tensor:
        """[H]"""
        norms = [sums.sqrt() for name, sums in self._sums.items() if name.rpartition(".")[2] in _NORMS]
        return torch.stack(norms).sum(0)

    def _of_layers(self, kind: str) -> list[torch.Tensor]:
        found = {
            int(match[1]): sums.sqrt()
            for name, sums in self._sums.items()
            if name.endswith(kind) and (match := _LAYER.search(f".{name}"))
        }
        return [found[layer] for layer in range(len(self._layers))]


# ---- cutting


def make_narrower(folder: Path, width: StudentWidth, choice: WidthChoice, target: Path) -> None:
    """Writes the model in `folder` with what `choice` keeps of it to `target`, tokenizer included, in the dtypes of its
    files. What is in `target` gives way. It counts as made once `record_width` was called."""
    config = read_config(str(folder), key=_KEY)
    with written_aside(target, replace=True) as partial:
        copy_side_files(folder, partial)
        narrow_config(config, width).save_pretrained(partial)
        write_weights(partial, _narrower(folder, config, choice))
        check_model_folder(partial, _KEY)


def record_width(folder: Path, target: Path, rule: Mapping[str, Any], choice: WidthChoice, forward_kl: float) -> None:
    """Beside the student in `target`, made of what is in `folder`: how, and how far it is from the whole model."""
    record = {"rule": rule, "forward_kl": forward_kl, "layers": _layers_record(folder), "width": choice.as_record()}
    write_json(target / RECORD_FILE, record)


def _layers_record(folder: Path) -> Any:
    """How the layers of a student in `folder` were chosen; None if it has all."""
    file = folder / RECORD_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_made_by(folder: Path, rule: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the student that a run with this rule made, whole."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        check_model_folder(folder, _KEY)
        return record["rule"] == rule
    except (OSError, ValueError, KeyError, TypeError):  # another student, none, or a damaged one
        return False


def _narrower(folder: Path, config: PreTrainedConfig, choice: WidthChoice) -> Iterator[tuple[str, torch.Tensor]]:
    head_dim = _head_dim(config)
    for name, tensor in read_tensors(folder, _KEY):
        match = _LAYER.search(name)
        layer = int(match[1]) if match else None
        for place, axis in enumerate(_axes_of(name)):
            kept = None if axis is None else choice.along(axis, layer)
            if axis is not None and kept is not None:
                size = _places(axis, head_dim)
                places = torch.tensor(kept)[:, None] * size + torch.arange(size)
                tensor = tensor.index_select(place, places.flatten())
        if choice.hidden is not None and name.split(".")[-2] in _NORMS:
            tensor = _grown(tensor, math.sqrt(width_sizes(config)["hidden"] / len(choice.hidden)), config)
        yield name, tensor


def _grown(weight: torch.Tensor, factor: float, config: PreTrainedConfig) -> torch.Tensor:
    """A norm's weight, in its dtype, with which outputs are `factor` times as large. Gemma's norms add 1 to theirs."""
    added = 1.0 if config.get_text_config().model_type.startswith("gemma") else 0.0
    return ((weight.double() + added) * factor - added).to(weight.dtype)
