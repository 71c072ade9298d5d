"""The trainer's side of weight updates over NCCL, by vLLM's own engine, in a group of this process and a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gkd.chunks import WEIGHT_PIECE_BYTES

if TYPE_CHECKING:
    import torch


def server_info(host: str, port: int) -> dict[str, Any]:
    """What the server's weight-transfer engine has to know of a group that meets there."""
    return {**_rendezvous(host, port), "rank_offset": 1, "packed": True, "packed_buffer_size_bytes": WEIGHT_PIECE_BYTES}


def join(host: str, port: int) -> Any:
    """The group, once both are there."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init(_rendezvous(host, port))


def send(group: Any, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    packed_nccl_broadcast_producer(
        iterator=iter(tensors),
        group=group,
        src=0,
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=WEIGHT_PIECE_BYTES,
    )


def _rendezvous(host: str, port: int) -> dict[str, Any]:
    return {"master_address": host, "master_port": port, "world_size": 2}
