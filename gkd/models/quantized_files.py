"""Models whose files hold weights of few bits, packed as compressed-tensors packs them: written, recognised and read.

In memory gkd has plain numbers only: what is read is unpacked, and computes what the files say in any dtype.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError
from gkd.models.weights import read_tensors

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedConfig, PreTrainedModel

    from gkd.models.quantization import Quantization

CONFIG = "quantization_config"  # of a config.json
_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_COLUMN_GROUPS = ".weight_g_idx"  # of columns that were quantized in another order
_ALSO_CHANGES = ("transform_config", "sparsity_config")  # the weights, in ways that are not read here


def packed_config(quantization: Quantization, model: PreTrainedModel, quantized: Container[str]) -> dict[str, Any]:
    """What config.json says of `model`, whose weights of these names are packed."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from torch import nn

    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    config = QuantizationConfig(
        config_groups={"group_0": _scheme(quantization.bits, quantization.group_size)},
        format=_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted(name for name in linear if f"{name}.weight" not in quantized),
    )
    return {**config.model_dump(mode="json"), "quant_method": _METHOD}


def packed_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], scales: Mapping[str, torch.Tensor], quantization: Quantization
) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors` with those of `scales`, by name, packed. They come rounded: each is a whole number of its scale."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    scheme = _scheme(quantization.bits, quantization.group_size)
    for name, tensor in tensors:
        if name not in scales:
            yield name, tensor
            continue
        module = {"weight": tensor.detach().float().cpu(), "weight_scale": scales[name].float().cpu()}
        stem = name.removesuffix("weight")
        for part, packed in PackedQuantizationCompressor.compress(module, scheme).items():
            yield stem + part, packed


def packed_scheme(config: PreTrainedConfig, path: str, key: str) -> QuantizationScheme | None:
    """How a model's files hold its weights; None for plain numbers.

    Raises ModelError, starting with `key`, for what is not read here: whole numbers alone are, of weights alone.
    """
    stored: Any = getattr(config, CONFIG, None)
    if stored is None:
        return None
    values: Mapping[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("quant_method") != _METHOD or values.get("format") != _FORMAT:
        method = values.get("quant_method", "by a method without a name")
        raise ModelError(
            f"{key}: {path} is quantized ({method}); gkd reads plain weights and those that compressed-tensors packed "
            f"({_FORMAT}): use the model it was made from"
        )
    return _only_scheme(values, path, key)


def _only_scheme(values: Mapping[str, Any], path: str, key: str) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        groups = QuantizationConfig.model_validate({**values, "quant_method": _METHOD}).config_groups
    except ValidationError as error:
        raise ModelError(f"{key}: {path}: the {CONFIG} of config.json is not compressed-tensors' ({error})") from None
    schemes: list[Any] = list(groups.values())
    changed = next((name for name in _ALSO_CHANGES if values.get(name)), None)
    if changed is not None:
        raise ModelError(
            f"{key}: {path}: the {changed} of its config.json is not read here; use the model it was made from"
        )
    if len(schemes) != 1 or not schemes[0].weights or schemes[0].input_activations or not schemes[0].weights.symmetric:
        raise ModelError(
            f"{key}: {path} is quantized in another way than one symmetric scheme of weights; use the model it was "
            "made from"
        )
    return schemes[0]


def plain_names(names: Iterable[str]) -> set[str]:
    """What the tensors of a folder are called once they are unpacked."""
    found = set(names)
    return {_plain_name(name) for name in found if not _describes_packed(name, found)}


def plain_shapes(shapes: Mapping[str, tuple[int, ...]], scheme: QuantizationScheme) -> dict[str, tuple[int, ...]]:
    """Shapes by those names; of rows whose length is a whole number of the words that they are packed in."""
    assert scheme.weights is not None
    numbers = 32 // scheme.weights.num_bits  # of a word
    return {
        _plain_name(name): (*shape[:-1], shape[-1] * numbers) if name.endswith(_PACKED) else shape
        for name, shape in shapes.items()
        if not _describes_packed(name, shapes)
    }


def _plain_name(name: str) -> str:
    return f"{_module(name)}.weight" if name.endswith(_PACKED) else name


def _describes_packed(name: str, names: Container[str]) -> bool:
    """Scale, shape or order of a packed weight."""
    return name.endswith((_SCALE, _SHAPE, _COLUMN_GROUPS)) and _module(name) + _PACKED in names


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def plain_tensors(folder: Path, scheme: QuantizationScheme, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a packed folder, unpacked, under the names that they have in transformers' models.

    Raises ModelError, starting with `key`, if a part of one is missing.
    """
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    wanted = _parts(scheme)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(folder, key):
        suffix = "." + name.rpartition(".")[2]
        if suffix not in wanted:
            yield name, tensor
            continue
        module = parts.setdefault(_module(name), {})
        module[suffix[1:]] = tensor
        if len(module) == len(wanted):
            plain = PackedQuantizationCompressor.decompress(parts.pop(_module(name)), scheme)
            yield f"{_module(name)}.weight", plain["weight"]
    if parts:
        raise ModelError(f"{key}: {folder}: {min(parts)} lacks one of {', '.join(part[1:] for part in wanted)}")


def _parts(scheme: QuantizationScheme) -> tuple[str, ...]:
    """Of a packed weight."""
    from compressed_tensors.quantization import ActivationOrdering

    assert scheme.weights is not None
    in_order = scheme.weights.actorder != ActivationOrdering.GROUP
    return (_PACKED, _SCALE, _SHAPE) if in_order else (_PACKED, _SCALE, _SHAPE, _COLUMN_GROUPS)


def _scheme(bits: int, group_size: int) -> QuantizationScheme:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )

    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)
