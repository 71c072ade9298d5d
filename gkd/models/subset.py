"""A student made of some of a teacher's layers: the same model with fewer of them, copied file to file."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError
from gkd.models.fingerprint import model_fingerprint
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.load import empty_model, read_config
from gkd.models.resolve import local_folder
from gkd.models.weight_files import check_model_folder, read_header, weight_files
from gkd.models.weights import read_tensors, write_weights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from gkd.models.layer_choice import LayerChoice

logger = logging.getLogger(__name__)

_KEY = "student.init.layers"
RECORD_FILE = "student_init.json"  # how a student was made
_LAYER_NAME = re.compile(r"(?P<before>.*?\.)(?P<index>\d+)(?P<after>\..*)")
# lists of a config with one entry a layer, and lists of layer numbers
_PER_LAYER_LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attention_types", "no_rope_layers",
    "moe_layer_freq", "moe_layers_enum", "intermediate_size", "activation_sparsity_pattern", "indexer_types",
)  # fmt: skip
_LAYER_NUMBER_LISTS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers", "dense_layers")


def choose_layers(layers: int | Sequence[int], available: int) -> list[int]:
    """The layers to keep: `layers` itself if it is a list, else that many, evenly spaced with both ends (one = 0).

    Raises ModelError, naming student.init.layers and the valid range, for a count or a list that does not fit.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise ModelError(f"{_KEY}: {layers} of a model of {available} layers; must be 1 to {available}")
        if layers == 1:
            return [0]
        return [round(i * (available - 1) / (layers - 1)) for i in range(layers)]
    chosen = list(layers)
    if not chosen:
        raise ModelError(f"{_KEY}: names no layer; list some of 0 to {available - 1}")
    outside = [layer for layer in chosen if not 0 <= layer < available]
    if outside:
        raise ModelError(f"{_KEY}: layer {outside[0]} does not exist; the model has 0 to {available - 1}")
    for before, after in pairwise(chosen):
        if before >= after:
            fault = "stands twice" if before == after else f"stands after {before}"
            raise ModelError(f"{_KEY}: layer {after} {fault}; list layers of 0 to {available - 1} in rising order")
    return chosen


def make_student_from_layers(
    teacher_folder: str | Path,
    layers: int | Sequence[int],
    out_folder: str | Path,
    *,
    revision: str | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model of some layers of `teacher_folder`, tokenizer included, to `out_folder` and returns it.

    `teacher_folder` may also be a hub name, then with its `revision`. `chosen` says for the record how the layers were
    chosen, in plain values.
    The kept layers are renumbered; embeddings, final norm and head are the teacher's, in the dtype of its files.
    A folder that an earlier call made from the same teacher and layers is returned as it is.
    Raises ModelError if the layers do not fit (see `choose_layers`), if the architecture cannot be cut, or if
    `out_folder` holds something else.
    """
    source, target = local_folder(str(teacher_folder), revision=revision, key=_KEY), Path(out_folder)
    available = read_config(str(source), key=_KEY).get_text_config().num_hidden_layers
    kept = choose_layers(layers, available)
    record = {"source_fingerprint": model_fingerprint(source, key=_KEY), "layers": kept, "of_layers": available}
    record |= {} if chosen is None else {"chosen": dict(chosen)}
    if _is_made(target, record):
        return target
    logger.info("making a student of layers %s of %d: %s", kept, available, target)
    with written_aside(target, replace=True) as partial:
        copy_side_files(source, partial)
        _cut_config(source, kept).save_pretrained(partial)
        write_weights(partial, _kept_tensors(source, kept, available))
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for warning in _check_layers(source, read_config(str(partial), key=_KEY), kept):
            logger.warning(warning)
        check_model_folder(partial, _KEY)
    return target


def config_of_layers(
    teacher_folder: str | Path, layers: int | Sequence[int], *, revision: str | None = None
) -> PreTrainedConfig:
    """The config that `make_student_from_layers` writes. Raises ModelError where that would, but writes nothing."""
    source = local_folder(str(teacher_folder), revision=revision, key=_KEY)
    available = read_config(str(source), key=_KEY).get_text_config().num_hidden_layers
    kept = choose_layers(layers, available)
    _layers_prefix(source, available)
    with tempfile.TemporaryDirectory() as folder:
        _cut_config(source, kept).save_pretrained(folder)
        config = read_config(folder, key=_KEY)
    _check_layers(source, config, kept)
    return config


def recorded_choice(folder: Path, rule: Mapping[str, Any]) -> LayerChoice | None:
    """The choice that the student in `folder` was made by, if that was by `rule`."""
    from gkd.models.layer_choice import LayerChoice

    try:
        chosen = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["chosen"]
        return LayerChoice.from_record(chosen) if rule.items() <= chosen.items() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # made by no choice, or damaged
        return None


def _is_made(target: Path, record: dict[str, Any]) -> bool:
    """True if `target` is this very student; raises rather than overwrite a folder that was not made here."""
    if not target.exists() or not any(target.iterdir()):
        return False
    record_file = target / RECORD_FILE
    if not record_file.is_file():
        raise ModelError(f"{_KEY}: {target} holds files that are not a student made from layers; empty or move it")
    try:
        if json.loads(record_file.read_text(encoding="utf-8")) != record:
            return False
        check_model_folder(target, _KEY)
    except ValueError:  # damaged since: make it anew
        return False
    return True


def _cut_config(source: Path, kept: list[int]) -> PreTrainedConfig:
    config = read_config(str(source), key=_KEY)
    text_config = config.get_text_config()
    available = text_config.num_hidden_layers
    text_config.num_hidden_layers = len(kept)
    for name in _PER_LAYER_LISTS:
        values = getattr(text_config, name, None)
        if isinstance(values, list | tuple) and len(values) == available:
            setattr(text_config, name, [values[layer] for layer in kept])
    for name in _LAYER_NUMBER_LISTS:
        values = getattr(text_config, name, None)
        if isinstance(values, list | tuple):
            setattr(text_config, name, [new for new, layer in enumerate(kept) if layer in values])
    return config


def _kept_tensors(source: Path, kept: list[int], available: int) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = _layers_prefix(source, available)
    new_index = {layer: new for new, layer in enumerate(kept)}
    for name, tensor in read_tensors(source, _KEY):
        match = _LAYER_NAME.fullmatch(name)
        if match is None or match["before"] != prefix:
            yield name, tensor
        elif int(match["index"]) in new_index:
            yield f"{prefix}{new_index[int(match['index'])]}{match['after']}", tensor


def _layers_prefix(source: Path, available: int) -> str:
    """What stands before the layer number in the names of the layers' tensors: "model.layers." for Llama."""
    names = [name for file in weight_files(source, _KEY) for name in read_header(file, _KEY)]
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER_NAME.fullmatch(name):
            numbers.setdefault(match["before"], set()).add(int(match["index"]))
    prefixes = [prefix for prefix, found in numbers.items() if found == set(range(available))]
    if len(prefixes) != 1:
        raise ModelError(
            f"{_KEY}: cannot tell which tensors are the {available} layers of this architecture "
            f"(candidates: {', '.join(prefixes) or 'none'}); give a student.model instead"
        )
    return prefixes[0]


def _check_layers(source: Path, student_config: PreTrainedConfig, kept: list[int]) -> list[str]:
    """Compares each kept layer's modules, as built from both configs without weights.

    Raises ModelError if the student builds another kind of layer where a teacher's layer was put. Returns a warning
    for each layer that only behaves differently there (a sliding window that depends on its position, say).
    """
    from gkd.models.layer_stack import layers_of

    teacher_config = read_config(str(source), key=_KEY)
    teacher_layers = layers_of(empty_model(teacher_config), teacher_config, _KEY)
    warnings: list[str] = []
    student_layers = layers_of(empty_model(student_config), student_config, _KEY)
    for new, layer in enumerate(kept):
        teacher_shapes = {name: tuple(p.shape) for name, p in teacher_layers[layer].named_parameters()}
        student_shapes = {name: tuple(p.shape) for name, p in student_layers[new].named_parameters()}
        if teacher_shapes != student_shapes:
            name = sorted(teacher_shapes.items() ^ student_shapes.items())[0][0]
            raise ModelError(
                f"{_KEY}: layer {layer} of this architecture cannot become layer {new}, which is of another kind "
                f"({name}); choose other layers or give a student.model"
            )
        for difference in _differences(teacher_layers[layer], student_layers[new], layer - new):
            warnings.append(f"{_KEY}: layer {layer} becomes layer {new} and changes {difference}")
    return warnings


def _differences(teacher_layer: nn.Module, student_layer: nn.Module, shift: int) -> Iterator[str]:
    """Plain settings of the modules that differ, other than a layer number, which differs by `shift`."""
    student_modules = dict(student_layer.named_modules())
    for name, teacher_module in teacher_layer.named_modules():
        settings = vars(student_modules[name]) if name in student_modules else {}
        for setting, old in vars(teacher_module).items():
            new = settings.get(setting)
            if not isinstance(old, int | float | str | None) or old == new:
                continue
            is_layer_number = type(old) is int and type(new) is int and old - new == shift
            if not is_layer_number:
                yield f"{'.'.join(filter(None, (name, setting)))} from {old} to {new}"
