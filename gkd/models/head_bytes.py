"""An output head as bytes: on its way from a server to the trainers, or on a disk.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gkd.types import OutputHead

if TYPE_CHECKING:
    import torch

_METADATA_KEY = "head"  # one key only: safetensors writes several in no fixed order, and equal heads must hash equally


def head_to_bytes(head: OutputHead) -> bytes:
    """safetensors of `weight` [V, H] and, if there is one, `bias` [V]; equal heads give equal bytes."""
    from safetensors.torch import save

    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    settings = json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})
    return save(tensors, metadata={_METADATA_KEY: settings})


def head_from_bytes(data: bytes, device: torch.device) -> OutputHead:
    """The inverse of `head_to_bytes`, on `device`. Raises ValueError or KeyError if `data` is no head."""
    from safetensors.torch import load

    tensors = load(data)
    header_bytes = int.from_bytes(data[:8], "little")
    settings = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_METADATA_KEY])
    bias = tensors.get("bias")
    return OutputHead(
        tensors["weight"].to(device),
        None if bias is None else bias.to(device),
        float(settings["logit_scale"]),
        None if settings["softcap"] is None else float(settings["softcap"]),
    )
