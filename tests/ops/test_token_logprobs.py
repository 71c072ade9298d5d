"""Log-probabilities of given tokens, held to log_softmax over full logits in float64."""

from __future__ import annotations

import pytest
import torch

from gkd.errors import InputError
from gkd.ops import token_logprobs as op
from gkd.ops.token_logprobs import token_logprobs
from gkd.types import OutputHead

N, H, V = 40, 16, 70


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, OutputHead, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, H), (V, H), (V,)))
    labels = torch.randint(V, (N,), generator=generator)
    return hidden.to(dtype), OutputHead(weight.to(dtype), bias.to(dtype), 0.7, 4.0), labels


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_against_full_logits(
    dtype: torch.dtype, bound: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels = inputs(dtype)
    assert head.bias is not None and head.softcap is not None
    monkeypatch.setattr(op, "_CHUNK_BYTES", chunk_rows * V * (8 if dtype == torch.float64 else 4))
    logits = (hidden.double() @ head.weight.double().T + head.bias.double()) * head.logit_scale
    logits = head.softcap * torch.tanh(logits / head.softcap)
    want = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    got = token_logprobs(hidden, head, labels)
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


def test_it_rounds_to_the_compute_dtype_and_needs_no_row() -> None:
    hidden, head, labels = inputs(torch.float32)
    rounded = OutputHead(head.weight.bfloat16(), head.bias, head.logit_scale, head.softcap)
    got = token_logprobs(hidden, head, labels, torch.bfloat16)
    torch.testing.assert_close(got, token_logprobs(hidden.bfloat16(), rounded, labels))
    assert not torch.equal(got, token_logprobs(hidden, head, labels))
    assert token_logprobs(hidden[:0], head, labels[:0]).shape == (0,)
    with pytest.raises(InputError, match=r"\[N, H\]"):
        token_logprobs(hidden[:, 1:], head, labels)
