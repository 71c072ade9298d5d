"""Counts from a config.json against the models that transformers builds from it, and against torch's FLOP counter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from gkd.errors import ModelError
from gkd.planning.models import SHIPPED_FOLDER, Architecture, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 untied": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True, "head_dim": 32}),
    "qwen3 moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32}),
    "qwen3 moe, some dense": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
}


def built(case: str, **more: Any) -> tuple[Architecture, Any]:
    """What the planner reads from a config, and the model without memory that transformers makes of it."""
    import transformers

    name, values = CASES[case]
    config = getattr(transformers, f"{name}Config")(**SIZES, **values)
    with torch.device(more.pop("device", "meta")):
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, **more)
    return read_architecture(config.to_dict(), case, "student.model"), model


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_exactly_those_of_transformers(case: str) -> None:
    architecture, model = built(case)
    assert architecture.parameters == model.num_parameters()


@pytest.mark.parametrize("case", ["qwen3 moe", "mixtral"])
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(case: str) -> None:
    architecture, model = built(case)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = architecture.active_experts / architecture.experts
    assert architecture.active_parameters == pytest.approx(architecture.parameters - experts * (1 - share))


@pytest.mark.parametrize("case", ["llama", "qwen3 untied", "qwen2"])
def test_flops_agree_with_torch(case: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    architecture, model = built(case, device="cpu", attn_implementation="eager")
    rows, tokens = 2, 32
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.randint(0, 131, (rows, tokens)), use_cache=False).logits.sum()
    forward = counter.get_total_flops()
    # eager attention multiplies the whole square, so every token attends to all of them
    assert rows * tokens * (architecture.forward_flops(tokens) + architecture.head_flops) == pytest.approx(
        forward, rel=0.01
    )
    with counter:
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(2 * forward, rel=0.05), "a backward is two forwards"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "qwen3 untied"])
def test_activations_are_what_autograd_saves(case: str, dtype: str) -> None:
    architecture, model = built(case, device="cpu", attn_implementation="sdpa")
    saved = saved_bytes(model.train(), dtype)
    assert architecture.activation_bytes(dtype, checkpointing=False) == pytest.approx(saved, rel=0.03)


def test_checkpointing_saves_each_layers_input() -> None:
    """The recomputed layer comes on top, while the backward is in it."""
    architecture, model = built("llama", device="cpu")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = saved_bytes(model.train(), "bfloat16")
    planned = architecture.activation_bytes("bfloat16", True) - architecture.saved_bytes_a_layer("bfloat16")
    assert planned == pytest.approx(saved, rel=0.06)


def saved_bytes(model: Any, dtype: str) -> float:
    """Bytes a token that autograd keeps, weights and their casts not counted."""
    rows, tokens = 2, 50  # a number of positions that is no width of the model's
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_cast = tensor.dim() == 2 and rows * tokens not in tensor.shape and tuple(tensor.shape) != (rows, tokens)
        if tensor.untyped_storage().data_ptr() not in weights and not is_cast:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        kept: nn.Module = model.model(
            input_ids=torch.randint(0, 131, (rows, tokens)), use_cache=False
        ).last_hidden_state
    assert kept is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / (rows * tokens)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [  # as published: Qwen3 technical report, table 1 and 2, and SmolLM2's card
        ("Qwen3-0.6B", 0.6e9, 0.6e9),
        ("Qwen3-1.7B", 1.7e9, 1.7e9),
        ("Qwen3-8B", 8.2e9, 8.2e9),
        ("Qwen3-32B", 32.8e9, 32.8e9),
        ("Qwen3-235B-A22B", 235e9, 22e9),
        ("SmolLM2-135M-Instruct", 0.135e9, 0.135e9),
    ],
)
def test_shipped_sizes_are_the_published_ones(name: str, parameters: float, active: float) -> None:
    values = json.loads((SHIPPED_FOLDER / f"{name}.json").read_text())
    architecture = read_architecture(values, name, "student.model")
    assert architecture.parameters == pytest.approx(parameters, rel=0.015)
    assert architecture.active_parameters == pytest.approx(active, rel=0.015)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED_FOLDER.glob("*.json")))
def test_transformers_builds_the_same_from_what_is_shipped(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads((SHIPPED_FOLDER / f"{name}.json").read_text())
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_architecture(values, name, "student.model").parameters == model.num_parameters()


def test_keys_and_values_of_a_token() -> None:
    architecture, _ = built("qwen3 tied")
    assert architecture.kv_bytes("bfloat16") == 2 * 3 * 2 * 32 * 2  # both, layers, heads, width, bytes


def test_few_tokens_read_few_experts() -> None:
    architecture, _ = built("qwen3 moe")
    one, many = (architecture.weights_read_bytes(tokens, "bfloat16") for tokens in (1, 10_000))
    expert = 2 * 3 * 64 * 40
    assert many - one == pytest.approx(architecture.layers * (6 - 2) * expert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_a_config_that_cannot_be_planned_for(change: dict[str, Any], message: str) -> None:
    values = {**SIZES, "model_type": "llama", **change}
    with pytest.raises(ModelError, match=f"^student.model: x: .*{message}"):
        read_architecture(values, "x", "student.model")
