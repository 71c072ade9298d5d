"""Short sequences on a CPU are attended to in float32, under autocast too; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from gkd.models import use_short_attention
from gkd.models.attention import attend

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make(window: int | None = None) -> Any:
    torch.manual_seed(1)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if window is None
        else MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    )
    model.set_attn_implementation("sdpa")
    return model.eval()


def states(dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, tokens, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("tokens", [7, 192])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype, autocast: bool, tokens: int) -> None:
    module = torch.nn.Module()
    module.is_causal = True  # pyright: ignore[reportArgumentType]
    query, key, value = states(dtype, tokens)
    exact = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attend(module, query, key, value, None)
    assert torch.equal(found, exact.bfloat16())


def test_longer_sequences_are_left_to_pytorch() -> None:
    module = torch.nn.Module()
    module.is_causal = True  # pyright: ignore[reportArgumentType]
    query, key, value = states(torch.bfloat16, 193)
    found, _ = attend(module, query, key, value, None)
    assert torch.equal(found, scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2))


@pytest.mark.parametrize("window", [None, 4])
def test_padding_on_the_left_and_windows_are_masked_as_before(window: int | None) -> None:
    before, after = make(window), make(window)
    use_short_attention(after)
    rows = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[1, :5] = 0
    for attention_mask in (None, mask):
        expected = before(input_ids=rows, attention_mask=attention_mask).logits
        found = after(input_ids=rows, attention_mask=attention_mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_with_an_attention_of_its_own_keeps_it() -> None:
    model = make()
    model.set_attn_implementation("eager")
    use_short_attention(model)
    assert model.config._attn_implementation == "eager"
