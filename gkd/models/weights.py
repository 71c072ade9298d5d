"""The safetensors of a model folder, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gkd.digests import digest
from gkd.models.weight_files import INDEX_FILE, SINGLE_FILE, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def read_tensors(folder: Path, key: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder on the CPU, one resident at a time, under the names of the files; `wanted` chooses
    some of the names."""
    from safetensors import safe_open

    for file in weight_files(folder, key):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                if wanted is None or name in wanted:
                    yield name, tensors.get_tensor(name)


def file_tensors(
    model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of `model` under the names and in the pieces that its files and vLLM use.

    For most models this changes nothing. For mixtures of experts transformers keeps all experts of a layer in one
    parameter, which the files hold one by one. `model` tells the architecture; it may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in tensors:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 << 30,
) -> int:
    """Writes `tensors` as safetensors shards with an index, or one file if one is enough; returns their bytes.

    Holds one shard in memory. Each tensor is copied before the next is asked for, so that it may be a view of a
    buffer that the iterator reuses. `dtype` converts floating-point tensors; None keeps each one's own.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0
    for name, tensor in tensors:
        copy = _cpu_copy(tensor, dtype)
        if shard and shard_bytes + copy.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, shard_bytes = {}, 0
        shard[name] = copy
        shard_bytes += copy.nbytes
        total_bytes += copy.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    _name_shards(folder, shards, total_bytes)
    return total_bytes


def _cpu_copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device="cpu", dtype=target, copy=True).contiguous()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """16 bytes that change with any bit of a tensor's values; neither shape nor dtype is in them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return digest(flat.view(torch.uint8).numpy())


def nonfinite_row(tensor: torch.Tensor) -> int | None:
    """The first row (of the first dimension) with a value that is not finite, or None."""
    if tensor.sum().isfinite():  # a NaN or infinity stays in a sum, and this is ten times faster than to ask for each
        return None
    finite = tensor.isfinite()
    if finite.all():
        return None
    rows = finite.reshape(len(finite), -1).all(1) if finite.dim() else finite[None]
    return int((~rows).nonzero()[0])


def _write_shard(folder: Path, index: int, shard: dict[str, torch.Tensor]) -> list[str]:
    from safetensors.torch import save_file

    file = folder / f"shard-{index}"
    save_file(shard, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library writes for its owner alone; a model is for those who can enter its folder
    return list(shard)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
