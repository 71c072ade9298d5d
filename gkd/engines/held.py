"""What a model of vLLM's holds of the weights that it was sent, by the names that they were sent under."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gkd.models.held import WeightChecksums, checksum, columns_checksum, drawn_columns, one_hot_rows


@torch.no_grad()
def held_weights(model: Any, version: int) -> WeightChecksums:
    """Of the weights that this process has whole: with tensor parallelism those that are not split.

    vLLM joins matrices that have the same input; their parts are compared one by one. On a CPU it packs them and lets
    go of what it packed, so a product reads columns back. A tied head is packed beside its embedding: both are looked
    at.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    held = WeightChecksums()
    reordered: set[str] = set()
    embeddings: dict[int, str] = {}  # where a weight lies -> its name
    modules: Any = model.named_modules()
    for prefix, module in modules:
        if isinstance(module, VocabParallelEmbedding):
            if module.tp_size == 1:
                weight: Any = module.weight
                name = embeddings.setdefault(weight.data_ptr(), f"{prefix}.weight")
                rows = weight[: module.org_vocab_size]
                held.whole.setdefault(name, checksum(rows))
                _read_back(held, module, [(name, module.org_vocab_size)], module.embedding_dim, version)
        elif isinstance(module, LinearBase):
            if module.tp_size == 1:
                parts = list(_parts(model, prefix, module))
                reordered |= {f"{name}.weight" for name, _ in parts}
                _add_linear(held, module, parts, version)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    held.whole[f"{prefix}.{name}"] = checksum(parameter)
    return WeightChecksums(held.whole, held.columns, may_be_reordered=frozenset(reordered))


def _parts(model: Any, prefix: str, module: Any) -> Iterator[tuple[str, int]]:
    """(name, rows) of the matrices that stand one below the other in a linear module. None where vLLM joins several
    that the student has as one: in which order is known to its loader alone."""
    parent, _, own = prefix.rpartition(".")
    names = getattr(model, "packed_modules_mapping", {}).get(own, [own])
    sizes = module.output_partition_sizes
    if len(names) == len(sizes):
        yield from ((f"{parent}.{name}", size) for name, size in zip(names, sizes, strict=True))


def _add_linear(held: WeightChecksums, module: Any, parts: list[tuple[str, int]], version: int) -> None:
    sizes = [size for _, size in parts]
    for kind in ("weight", "bias"):
        parameter = getattr(module, kind, None)
        if isinstance(parameter, torch.Tensor) and parameter.dim() and len(parameter) == sum(sizes) > 0:
            for (name, _), rows in zip(parts, parameter.split(sizes), strict=True):
                held.whole[f"{name}.{kind}"] = checksum(rows)
    _read_back(held, module, [(f"{name}.weight", size) for name, size in parts], module.input_size, version)


def _read_back(held: WeightChecksums, module: Any, parts: list[tuple[str, int]], columns: int, version: int) -> None:
    """By the product that the module computes with, where that is one with a packed copy of its weight."""
    multiply = getattr(module, "cpu_linear", None)
    if not parts or multiply is None or multiply is torch.nn.functional.linear:
        return
    rows = one_hot_rows(drawn_columns(version, columns), columns, module.weight.dtype, module.weight.device)
    product = module.quant_method.apply(module, rows)
    start = 0
    for name, size in parts:
        held.columns[name] = columns_checksum(product[:, start : start + size])
        start += size
