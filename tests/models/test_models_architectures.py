"""Architectures that are not plain decoders: attention of their own, experts, routers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, Mamba2Config, MixtralConfig, PreTrainedConfig

from gkd.config import LoraConfig, make_config
from gkd.errors import ConfigError
from gkd.models import empty_model, has_experts, load_causal_lm, lora_targets, verify_head
from gkd.train.distiller import Distiller
from gkd.train.parts import sampling

SHARED: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
ATTENTION: dict[str, Any] = {
    "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip


def gpt_oss() -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return GptOssConfig(**SHARED, **ATTENTION, sliding_window=8, layer_types=kinds, rope_parameters=rope)


def mamba2() -> PreTrainedConfig:
    return Mamba2Config(**SHARED, num_heads=4, head_dim=16, state_size=16, n_groups=1, chunk_size=16)


def mixtral(**keys: Any) -> PreTrainedConfig:
    return MixtralConfig(**SHARED, **ATTENTION, **keys)


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("make", [gpt_oss, mamba2])
def test_models_with_an_attention_of_their_own(tmp_path: Path, make: Any) -> None:
    """The same logits as transformers' own choice, a head that is known, and gradients."""
    folder = saved(tmp_path, make())
    model: Any = load_causal_lm(str(folder), "float32")
    ids = torch.arange(3, 30)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits, reference(input_ids=ids, use_cache=False).logits)
    verify_head(model)
    logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {name for name, _ in empty_model(AutoConfig.from_pretrained(folder)).named_parameters()} == {
        name for name, _ in model.named_parameters()
    }


def test_router_outputs_are_off(tmp_path: Path) -> None:
    """They are of a loss that no run has; the file keeps what it says."""
    folder = saved(tmp_path, mixtral(output_router_logits=True))
    model: Any = load_causal_lm(str(folder), "float32")
    assert model(input_ids=torch.arange(3, 9)[None]).router_logits is None
    assert json.loads((folder / "config.json").read_text())["output_router_logits"] is True


def test_all_linear_of_fused_experts_is_refused(tiny_student: Path) -> None:
    """It would leave out most of the model. Convolutions are no reason to refuse."""
    model = empty_model(mixtral())
    with pytest.raises(ConfigError) as refused:
        lora_targets(model, LoraConfig(rank=2))
    assert re.fullmatch(
        r"student\.lora\.target_modules: all-linear leaves out experts\.gate_up_proj, experts\.down_proj, 49% of the "
        r"model, as fused .*, name them: \[q_proj, k_proj, v_proj, o_proj\]",
        str(refused.value),
    )
    named = lora_targets(model, LoraConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert len(named) == 8
    assert lora_targets(empty_model(mamba2()), LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="no linear module 'gate_up_proj'"):
        lora_targets(model, LoraConfig(rank=2, target_modules=["gate_up_proj"]))


def run_of(folder: Path, **rollout: Any) -> Any:
    data = folder.parent / "p.jsonl"
    data.write_text('{"prompt": "a"}\n')
    return make_config(
        {"teacher": {"model": str(folder)}, "student": {"model": str(folder), "lora": {"rank": 2}, "dtype": "float32"},
         "data": {"train": str(data), "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 8, **rollout},
         "run": {"dir": str(folder.parent / "run")}}
    )  # fmt: skip


def test_a_dry_run_refuses_it_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all-linear leaves out experts"):
        Distiller(run_of(saved(tmp_path / "model", mixtral()), engine="transformers")).check()


def test_which_runs_have_the_known_fault(tmp_path: Path, tiny_student: Path) -> None:
    folder = saved(tmp_path / "model", mixtral())
    assert has_experts(gpt_oss()) and not has_experts(mamba2())
    for path, engine, device, is_known in (
        (folder, "vllm", "cpu", True),
        (folder, "vllm", "cuda", False),
        (folder, "transformers", "cpu", False),
        (tiny_student, "vllm", "cpu", False),
    ):
        said = sampling._known_fault(run_of(folder, engine=engine), str(path), device)
        assert ("rollout.engine: transformers" in said) == is_known
