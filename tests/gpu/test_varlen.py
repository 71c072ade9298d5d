"""Flash attention of variable lengths on a GPU, forward and backward, against plain arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from attention_twin import varlen_twin

from gkd.models import varlen
from gkd.models.varlen import PackedSequences, attend_at_once, attends_at_once

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (9, 1, 300, 128, 77)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_states_and_gradients(
    dtype: torch.dtype, heads: int, key_heads: int, window: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), width) for count in (heads, key_heads, key_heads)]
    states = [torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_() for shape in shapes]
    sequences = PackedSequences.of(LENGTHS, torch.device("cuda"))
    upstream = torch.randn(1, sum(LENGTHS), heads, width, device="cuda", generator=generator).to(dtype)
    if not attends_at_once(states[0], states[2]):
        pytest.skip(f"this GPU or torch {torch.__version__} attends to sequences one by one")
    results: list[list[torch.Tensor]] = []
    for call in (varlen.varlen_attn, varlen_twin):
        monkeypatch.setattr(varlen, "varlen_attn", call)
        found = attend_at_once(*states, sequences, None, window)
        results.append([found.detach(), *torch.autograd.grad(found, states, upstream)])
    for name, found, expected in zip(("states", "query", "key", "value"), *results, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3), name
