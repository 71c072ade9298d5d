"""A teacher too large for one device: each rank keeps a share of it and gathers a layer at a time while it computes."""

from __future__ import annotations

from typing import Any

import torch

from gkd.models import backbone_of, output_head
from gkd.teacher.local import Backbone
from gkd.types import OutputHead


def sharded(model: Any, device: torch.device) -> tuple[Backbone, OutputHead]:
    """A `Placing` by DeepSpeed's ZeRO-3, without optimizer states. The process group must be there.

    The output head stays whole on every rank: the loss needs all of it at once. Parameters go to the device one by one
    as they are sharded, so that no device ever holds the model.
    """
    import deepspeed

    head = output_head(model)
    bias = None if head.bias is None else head.bias.detach().to(device, copy=True)
    whole_head = OutputHead(head.weight.detach().to(device, copy=True), bias, head.logit_scale, head.softcap)
    backbone = backbone_of(model)
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(head.weight.dtype)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used by training only
        "zero_optimization": {"stage": 3},
        **({half: {"enabled": True}} if half else {}),
    }
    deepspeed.zero.Init(module=backbone, config_dict_or_path=settings)
    engine = deepspeed.initialize(model=backbone, config=settings, dist_init_required=False)[0]
    engine.eval()
    return engine, whole_head
