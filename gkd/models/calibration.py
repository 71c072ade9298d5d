"""How far a cut model is from the whole one, on a few texts.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gkd.models.attention import use_short_attention
from gkd.models.load import load_causal_lm
from gkd.ops import divergence


@torch.no_grad()
def forward_kl(
    whole: Path, cut: Path, texts: Sequence[tuple[int, ...]], *, dtype: str, device: torch.device, key: str
) -> float:
    """KL(model in `whole` ‖ model in `cut`) in nats a token, over all positions of `texts` (token ids).

    One model at a time is in memory, and one model's float32 logits [T, V] of all texts.
    """
    logits = [_logits(folder, texts, dtype, device, key) for folder in (whole, cut)]
    sums = [float(divergence(student, teacher, "forward_kl")) for teacher, student in zip(*logits, strict=True)]
    return sum(sums) / sum(map(len, texts))


def _logits(
    folder: Path, texts: Sequence[tuple[int, ...]], dtype: str, device: torch.device, key: str
) -> list[torch.Tensor]:
    model = load_causal_lm(str(folder), dtype, key=key)
    use_short_attention(model)
    model.to(device)  # pyright: ignore[reportArgumentType]  its stub lacks `to`
    rows = (torch.tensor([ids], device=device) for ids in texts)
    return [model(input_ids=row, use_cache=False).logits[0].float().cpu() for row in rows]
