"""Backbone and head, put together by our formula, are the model: for every kind of head."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gkd.errors import ModelError
from gkd.models import backbone_of, head_logits, head_settings, heads, load_causal_lm, output_head, verify_head

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, tuple[dict[str, Any], tuple[float, float | None]]] = {
    "gemma2": ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    "gemma3_text": ({"final_logit_softcapping": 20.0}, (1.0, 20.0)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "cohere2": ({"logit_scale": 0.25}, (0.25, None)),
    "granite": ({"logits_scaling": 8.0}, (0.125, None)),
    "granitemoe": ({"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1}, (0.25, None)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
        (0.5, None),
    ),
}
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi": {},  # a bias in the head
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}


def _model(model_type: str, extra: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | extra))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


@pytest.mark.parametrize("model_type", SPECIAL)
def test_settings_are_found_and_proven(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, expected = SPECIAL[model_type]
    model = _model(model_type, extra)
    assert head_settings(model.config) == expected
    assert verify_head(model) <= 1e-6
    monkeypatch.setattr(heads, "head_settings", lambda config: (1.0, None))
    with pytest.raises(ModelError, match=r"^teacher\.model: the logits of \w+ differ .* does something that gkd"):
        verify_head(model, "teacher.model")


@pytest.mark.parametrize("model_type", PLAIN)
def test_plain_heads(model_type: str) -> None:
    model = _model(model_type, PLAIN[model_type])
    assert head_settings(model.config) == (1.0, None)
    assert verify_head(model) <= 1e-6
    assert (output_head(model).bias is not None) == (model_type == "phi")


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(model_type, SPECIAL[model_type][0], dtype)
    assert 0 < verify_head(model) < 2**-7
    scale, softcap = head_settings(model.config)
    monkeypatch.setattr(heads, "head_settings", lambda config: (1.05 * scale, softcap and 1.05 * softcap))
    with pytest.raises(ModelError, match="differ"):
        verify_head(model)


def test_a_bias_that_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("phi", {})
    without_bias = heads.OutputHead(output_head(model).weight)
    monkeypatch.setattr(heads, "output_head", lambda model: without_bias)
    with pytest.raises(ModelError, match="differ"):
        verify_head(model)


def test_states_from_before_the_final_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama", {})
    body = backbone_of(model)

    def too_early(**inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=body(**inputs, output_hidden_states=True).hidden_states[0])

    monkeypatch.setattr(heads, "backbone_of", lambda model: too_early)
    with pytest.raises(ModelError, match="differ"):
        verify_head(model)


def test_the_probe_leaves_the_model_as_it_was(tiny_untied_student: Path) -> None:
    model = load_causal_lm(str(tiny_untied_student), "float32").train()
    generator_state = torch.get_rng_state()
    verify_head(model)
    assert model.training
    assert not output_head(model).weight.grad_fn
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_damaged_weights(tiny_untied_student: Path) -> None:
    model = load_causal_lm(str(tiny_untied_student), "float32")
    with torch.no_grad():
        output_head(model).weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^student\.model: LlamaForCausalLM gives logits that are not finite"):
        verify_head(model)


def test_backbone_and_head_are_the_live_model(tiny_student: Path) -> None:
    model = load_causal_lm(str(tiny_student), "float32")
    backbone, head = backbone_of(model), output_head(model)
    assert head.weight is model.get_input_embeddings().weight  # tied
    ids = torch.tensor([[5, 6, 7, 0], [9, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert hidden.shape == (2, 4, 64)
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(head_logits(hidden, head)[mask.bool()], expected[mask.bool()])
    head_logits(hidden, head).sum().backward()
    assert head.weight.grad is not None


def test_a_model_without_a_head(tiny_student: Path) -> None:
    model = backbone_of(load_causal_lm(str(tiny_student), "float32"))
    with pytest.raises(ModelError, match="has no linear output head"):
        output_head(model)  # pyright: ignore
