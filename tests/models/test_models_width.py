"""A model made narrower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gkd.config import StudentWidth
from gkd.errors import ConfigError, GkdError
from gkd.models import WidthChoice, choose_width, forward_kl, is_made_by, make_narrower, narrow_config, record_width

CPU = torch.device("cpu")
TEXTS = [tuple(range(3, 20)), tuple(range(40, 31, -1))]
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma": Gemma3TextConfig
}  # fmt: skip
DEAD: dict[str, tuple[int, ...]] = {"hidden": (0, 7, 31, 62), "heads": (1, 3), "kv_heads": (1,), "ffn": (0, 50, 95)}


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def without_use_of(folder: Path, axis: str) -> Path:
    """The same model, but nothing of DEAD[axis] has any effect."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.tensor(DEAD[axis])
    heads = (rows[:, None] * 16 + torch.arange(16)).flatten()
    with torch.no_grad():
        if axis == "hidden":
            model.model.embed_tokens.weight[:, rows] = 0.0
        for layer in model.model.layers:
            if axis == "ffn":
                layer.mlp.up_proj.weight[rows] = 0.0
            elif axis == "kv_heads":
                layer.self_attn.v_proj.weight[heads] = 0.0
                if layer.self_attn.v_proj.bias is not None:
                    layer.self_attn.v_proj.bias[heads] = 0.0
            elif axis == "hidden":
                layer.self_attn.o_proj.weight[rows] = 0.0
                layer.mlp.down_proj.weight[rows] = 0.0
    model.save_pretrained(folder)
    return folder


def narrower(folder: Path, target: Path, **sizes: int) -> WidthChoice:
    width = StudentWidth(**sizes)
    choice = choose_width(folder, width, TEXTS, dtype="float32", device=CPU)
    make_narrower(folder, width, choice, target)
    return choice


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", ["hidden", "kv_heads", "ffn"])
def test_what_has_no_effect_goes_and_nothing_changes(family: str, axis: str, tmp_path: Path) -> None:
    """Gemma's embeddings are scaled by the root of the hidden size, so that other channels are never quite the same."""
    folder = without_use_of(saved(tmp_path / "whole", FAMILIES[family](**SIZES)), axis)
    kept = {"hidden": 60, "kv_heads": 1, "ffn": 93}[axis]
    choice = narrower(folder, tmp_path / "narrow", **{axis: kept})
    found = getattr(choice, axis)
    for layer in (found,) if axis == "hidden" else found:
        assert not set(layer) & set(DEAD[axis]) and len(layer) == kept
    figure = forward_kl(folder, tmp_path / "narrow", TEXTS, dtype="float32", device=CPU, key="k")
    assert figure < (0.1 if (family, axis) == ("gemma", "hidden") else 1e-9)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["head_dim"] == 16 and (tmp_path / "narrow" / "tokenizer.json").is_file()


def test_query_heads_stay_with_their_own(tmp_path: Path) -> None:
    folder = saved(tmp_path / "whole", LlamaConfig(**SIZES))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:  # the query heads 1 and 3 look away from what the others look at
            layer.self_attn.o_proj.weight[:, [*range(16, 32), *range(48, 64)]] = 0.0
    model.save_pretrained(folder)
    choice = narrower(folder, tmp_path / "narrow", heads=2)
    assert choice.kv_heads is None and choice.heads is not None
    for heads in choice.heads:
        assert [head // 2 for head in heads] == [0, 1], "one of each key-value head"
    whole = choose_width(folder, StudentWidth(heads=2, hidden=48), TEXTS, dtype="float32", device=CPU)
    assert whole.heads == choice.heads and whole.hidden is not None and len(whole.hidden) == 48


def test_all_at_once_and_what_is_recorded(tmp_path: Path) -> None:
    folder, target = saved(tmp_path / "whole", Qwen3Config(**SIZES)), tmp_path / "narrow"
    choice = narrower(folder, target, hidden=48, heads=1, kv_heads=1, ffn=40)
    student: Any = AutoModelForCausalLM.from_pretrained(target)
    assert student(input_ids=torch.tensor([TEXTS[0]])).logits.isfinite().all()
    shapes = {name.rpartition("layers.0.")[2]: tuple(p.shape) for name, p in student.named_parameters()}
    assert shapes["self_attn.o_proj.weight"] == (48, 16) and shapes["mlp.gate_proj.weight"] == (40, 48)
    assert WidthChoice.from_record(json.loads(json.dumps(choice.as_record()))) == choice
    rule = {"calibration_tokens": 26}
    assert not is_made_by(target, rule), "before it is recorded it may be half a student"
    record_width(folder, target, rule, choice, 1.5)
    assert is_made_by(target, rule) and not is_made_by(target, {"calibration_tokens": 27})
    (target / "model.safetensors").write_bytes(b"")
    assert not is_made_by(target, rule)


@pytest.mark.parametrize(
    ("config", "width", "message"),
    [
        (LlamaConfig(**SIZES), {"hidden": 65}, r"^student\.init\.width\.hidden: 65 of a model with 64$"),
        (LlamaConfig(**SIZES), {"heads": 3}, r"^student\.init\.width\.heads: 3 query heads for 2 .*, at most 2: 2, 4$"),
        (LlamaConfig(**SIZES), {"heads": 4, "kv_heads": 1}, r"^student\.init\.width\.heads: 4 .* for 1 .*: 1, 2$"),
        (LlamaConfig(**SIZES), {"hidden": 62}, r"^student\.init\.width: LlamaConfig takes no such sizes: .* \(62\)"),
        (
            MixtralConfig(**SIZES),
            {"ffn": 48},
            r"^student\.init\.width: .*(gate|experts).* is in no Llama, Qwen or Gemma; .* student\.model instead$",
        ),
        (
            GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_inner=96),
            {"hidden": 48},
            r"^student\.init\.width: .* is in no Llama, Qwen or Gemma",
        ),
    ],
)
def test_what_does_not_fit(config: PreTrainedConfig, width: dict[str, int], message: str) -> None:
    with pytest.raises((ConfigError, GkdError), match=message):
        narrow_config(config, StudentWidth(**width))
