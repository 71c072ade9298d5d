"""A finished model for deployment: its weights rounded and packed. Nothing is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from gkd.config import QuantizeConfig
from gkd.errors import CheckpointError, ModelError
from gkd.models.load import check_readable, empty_model, load_causal_lm, read_config
from gkd.models.quantization import Quantization, QuantizeKeys, quantization_targets
from gkd.models.quantized_files import CONFIG, packed_config, packed_tensors
from gkd.models.resolve import local_folder
from gkd.models.unpacked import write_changed
from gkd.models.weights import read_tensors


def pack(path: str, target: Path, quantize: QuantizeConfig, *, key: str, keys: QuantizeKeys) -> Path:
    """Writes a resolved model into `target`, rounded and packed, and returns it. Its other files come along.

    What was written is loaded again and compared before it is `target`. Raises ModelError, starting with `key`, for a
    model that is packed already or cannot be read, ConfigError, starting with one of `keys`, for what does not fit,
    CheckpointError if it loads as something else.
    """
    folder, config = local_folder(path, key=key), read_config(path, key=key)
    check_readable(config, path, key)
    model = empty_model(config)
    quantized = {f"{name}.weight" for name in quantization_targets(model, quantize, keys)}
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    quantization = Quantization.of(quantize, dtype)
    packing = {CONFIG: packed_config(quantization, model, quantized)}
    tensors = _rounded(folder, quantized, quantization, key)
    write_changed(
        folder,
        target,
        tensors,
        dtype,
        lambda settings: settings.update(packing),
        lambda written: _prove(folder, written, quantized, quantization, key),
    )
    return target


def _rounded(
    folder: Path, quantized: Collection[str], quantization: Quantization, key: str
) -> Iterator[tuple[str, torch.Tensor]]:
    left = set(quantized)
    for name, tensor in read_tensors(folder, key):
        if name not in quantized:
            yield name, tensor
            continue
        left.discard(name)
        scales = {name: quantization.scales(tensor)}
        yield from packed_tensors([(name, quantization.rounded(tensor))], scales, quantization)
    if left:
        raise ModelError(
            f"{key}: {folder}: its files have no {min(left)}, or call it something else; it stays as it is"
        )


def _prove(folder: Path, written: Path, quantized: Collection[str], quantization: Quantization, key: str) -> None:
    loaded = load_causal_lm(str(written), quantization.scale_dtype, key=key, may_be_packed=True)
    for name, tensor in read_tensors(folder, key):
        if name in quantized and not loaded.get_parameter(name).equal(
            quantization.rounded(tensor).to(quantization.scale_dtype)
        ):
            raise CheckpointError(f"{key}: {name} of {folder} does not load as it was rounded")
