"""The student's weights, whole: ZeRO-3's shards are gathered by one collective operation a bucket of parameters.

DeepSpeed's own way to see whole parameters takes one operation for each, however small: of SmolLM2's 272 tensors 61 are
norms of 576 numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gkd.chunks import gather_bucket_bytes
from gkd.models.leaving import LeavingWeight


@torch.no_grad()
def whole_tensors(
    weights: Mapping[str, LeavingWeight], device: torch.device, bucket_bytes: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each weight, in order; the values are those that the optimizer wrote, in the dtype it keeps.

    Collective where parameters are sharded. A tensor may share its memory with a parameter or with those of its bucket.
    """
    for bucket in _buckets(weights, bucket_bytes or gather_bucket_bytes(device.type)):
        whole = _Whole((p for name in bucket for p in weights[name].parameters), device)
        for name in bucket:
            yield name, weights[name].value(*map(whole.tensor, weights[name].parameters))


def _buckets(weights: Mapping[str, LeavingWeight], bucket_bytes: int) -> Iterator[list[str]]:
    """The same on all ranks: shapes and order decide."""
    bucket: list[str] = []
    taken_bytes = 0
    for name, weight in weights.items():
        size_bytes = sum(_shape(p).numel() * p.element_size() for p in weight.parameters)
        if bucket and taken_bytes + size_bytes > bucket_bytes:
            yield bucket
            bucket, taken_bytes = [], 0
        bucket.append(name)
        taken_bytes += size_bytes
    if bucket:
        yield bucket


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if _is_sharded(parameter) else parameter.shape


def _is_sharded(parameter: Any) -> bool:
    """By ZeRO-3, which keeps a rank's share of the values in `ds_tensor`, whether the parameter is whole now or not."""
    return getattr(parameter, "ds_tensor", None) is not None


def _is_at_hand(shard: Any) -> bool:
    """Not a file's, as with offload to NVMe, nor quantized (ZeRO++)."""
    return shard.final_location != "nvme" and not hasattr(shard, "ds_quant_scale")


class _Whole:
    """The whole tensors of some parameters."""

    def __init__(self, parameters: Iterable[Any], device: torch.device) -> None:
        self._device = device
        self._places: dict[int, tuple[torch.Tensor, int]] = {}  # of each sharded one its bucket, and where it begins
        alike: defaultdict[tuple[torch.dtype, Any], list[Any]] = defaultdict(list)
        for parameter in dict.fromkeys(parameters):
            if _is_sharded(parameter) and _is_at_hand(parameter.ds_tensor):
                alike[parameter.dtype, parameter.ds_process_group].append(parameter)
        for (_, group), members in alike.items():
            self._gather(members, group)

    def _gather(self, parameters: Sequence[Any], group: Any) -> None:
        shards = [p.ds_tensor.detach().reshape(-1).to(self._device) for p in parameters]  # each padded to the same size
        own = shards[0] if len(shards) == 1 else torch.cat(shards)
        ranks = own.new_empty(dist.get_world_size(group), own.numel())
        dist.all_gather_into_tensor(ranks.view(-1), own, group=group)  # pyright: ignore
        start = 0
        for parameter, shard in zip(parameters, shards, strict=True):
            self._places[id(parameter)] = ranks, start
            start += shard.numel()

    def tensor(self, parameter: Any) -> torch.Tensor:
        if not _is_sharded(parameter):
            return parameter.detach()
        if id(parameter) not in self._places:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        ranks, start = self._places[id(parameter)]
        flat = ranks[:, start : start + parameter.ds_tensor.numel()].reshape(-1)
        return flat[: parameter.ds_numel].view(parameter.ds_shape)
