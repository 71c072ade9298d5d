"""Packed sequences: states and gradients of each are those it has alone, and a model that cannot do it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_twin import varlen_twin
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
from gkd.models import backbone_of, load_causal_lm, packed_inputs, use_packed_attention, varlen
from gkd.models import packed as packing

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


# ---- one call a layer, as on a GPU, with a twin in the place of flash attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that the twin was called with."""
    shapes: list[tuple[int, ...]] = []

    def noted(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return varlen_twin(query, *others, **options)

    monkeypatch.setattr(varlen, "varlen_attn", noted)
    for module in (varlen, packing):
        monkeypatch.setattr(module, "FLASH_DEVICES", {"cpu"})
    return shapes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_call_a_layer_is_what_sequences_alone_are(name: str, autocast: bool, calls: list[tuple[int, ...]]) -> None:
    """Within the rounding of bfloat16, which both have; mistral's window is shorter than its sequences."""
    dtype = torch.float32 if autocast else torch.bfloat16
    alone, packed = make(name, dtype), make(name, dtype)
    use_packed_attention(packed, "key", torch.bfloat16)
    assert len(calls) == 2, "the proof goes the way of the training"
    calls.clear()
    rows = [torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    upstream = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = torch.cat([backbone_of(alone)(input_ids=row).last_hidden_state for row in rows], dim=1)
        inputs = packed_inputs(LENGTHS, torch.device("cpu"))
        found = backbone_of(packed)(input_ids=torch.cat(rows, dim=1), use_cache=False, **inputs).last_hidden_state
    assert calls == [(sum(LENGTHS), 4, 8)] * 2
    assert (found - expected).norm() < 0.03 * expected.norm()
    expected.backward(upstream)
    found.backward(upstream)
    gradients = [
        torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        for model in (alone, packed)
    ]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_one_call_that_sees_what_comes_later_is_refused(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of float32 weights under autocast is of the call that training makes."""
    at_once = varlen.attend_at_once
    monkeypatch.setattr(packing, "attend_at_once", lambda *arguments: at_once(*arguments).flip(1))
    use_packed_attention(make("llama", torch.float32), "key")
    with pytest.raises(ModelError, match=r"^key: packed sequences change the states of LlamaForCausalLM by"):
        use_packed_attention(make("llama", torch.float32), "key", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "width", "values", "dropout"),
    [(torch.float32, 8, 8, 0.0), (torch.bfloat16, 12, 12, 0.0), (torch.bfloat16, 512, 512, 0.0),
     (torch.bfloat16, 8, 16, 0.0), (torch.bfloat16, 8, 8, 0.1)],
)  # fmt: skip
def test_what_one_call_cannot_take_goes_sequence_by_sequence(
    dtype: torch.dtype, width: int, values: int, dropout: float, calls: list[tuple[int, ...]]
) -> None:
    query, value = torch.zeros(1, 4, 6, width, dtype=dtype), torch.zeros(1, 4, 6, values, dtype=dtype)
    assert not varlen.attends_at_once(query, value, dropout)
    assert varlen.attends_at_once(torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 6, 8))
    assert not calls
