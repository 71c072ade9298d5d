"""Packed sequences: states and gradients of each are those it has alone, and a model that cannot do it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gkd.errors import ModelError
from gkd.models import backbone_of, load_causal_lm, packed_inputs, use_packed_attention

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
}
LENGTHS = (9, 1, 14, 5)


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_each_sequence_alone(name: str, checkpointing: bool) -> None:
    alone, packed = make(name), make(name)
    use_packed_attention(packed, "key")
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
        packed.train()
        for module in packed.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    rows = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    upstream = torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([backbone_of(alone)(input_ids=row).last_hidden_state for row in rows], dim=1)
    inputs = packed_inputs(LENGTHS, torch.device("cpu"))
    found = backbone_of(packed)(input_ids=torch.cat(rows, dim=1), use_cache=False, **inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    expected.backward(upstream)
    found.backward(upstream)
    for (parameter_name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=parameter_name)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_rounds_no_more_than_unpacked(name: str) -> None:
    """On a CPU short sequences are attended to in float32."""
    exact, alone, packed = make(name), make(name, torch.bfloat16), make(name, torch.bfloat16)
    use_packed_attention(packed, "key")
    lengths = (40, 96, 230, 17)  # on both sides of the border
    rows = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    with torch.no_grad():
        states = [
            torch.cat([backbone_of(model)(input_ids=row).last_hidden_state for row in rows], dim=1)
            for model in (exact, alone)
        ]
        inputs = packed_inputs(lengths, torch.device("cpu"))
        found = backbone_of(packed)(input_ids=torch.cat(rows, dim=1), use_cache=False, **inputs).last_hidden_state
    assert (found - states[0]).norm() < 1.1 * (states[1] - states[0]).norm()


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_stay_as_they_were(name: str) -> None:
    before, after = make(name), make(name)
    use_packed_attention(after, "key")
    rows = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(input_ids=rows).logits, before(input_ids=rows).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_proof_passes_in_every_dtype(dtype: torch.dtype) -> None:
    use_packed_attention(make("llama", dtype), "key")


@pytest.mark.parametrize(
    "model",
    [
        lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager")),
    ],
    ids=["mamba", "gemma2"],
)
def test_a_model_that_cannot_be_packed_is_refused(model: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"^optim\.micro_batch_tokens: .*; set it to null$"):
        use_packed_attention(model(), "optim.micro_batch_tokens")


def test_a_saved_model_says_nothing_of_it(tiny_student: Path, tmp_path: Path) -> None:
    model = load_causal_lm(str(tiny_student), "float32")
    use_packed_attention(model, "key")
    model.save_pretrained(tmp_path)
    assert "gkd" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert load_causal_lm(str(tmp_path), "float32").config._attn_implementation == "sdpa"
