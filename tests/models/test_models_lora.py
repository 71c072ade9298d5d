"""Adapters in a model: where they go, what they freeze, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import setup_of
from tiny import claim_tied, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from gkd.config import LoraConfig, make_config
from gkd.errors import CheckpointError, ConfigError
from gkd.models import (
    ModelCard,
    Probe,
    adapter_parameters,
    adapter_weights,
    inject_lora,
    load_causal_lm,
    lora_targets,
    save_final,
    use_float32_adapters,
    whole_weights,
)
from gkd.models.leaving import LeavingWeight
from gkd.models.load import empty_model
from gkd.planning.models import read_architecture

IDS = torch.arange(3, 40)[None]
SHIPPED = Path(__file__).parents[2] / "configs" / "models"


def lora(**keys: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, **keys})


def adapted(folder: Path, dtype: str = "float32", *, fresh: bool = False, **keys: Any) -> Any:
    """A model with adapters that are no longer fresh: B is not zero."""
    model = load_causal_lm(str(folder), dtype)
    inject_lora(model, lora(**keys), seed=1)
    use_float32_adapters(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        if ".lora_B." in name and not fresh:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def probe(model: Any) -> Probe:
    logprobs = logits(model)[0, :-1].log_softmax(-1).gather(-1, IDS[0, 1:, None])[:, 0]
    return Probe(IDS[0].tolist(), logprobs.tolist(), 1e-4)


def stream(weights: Any) -> dict[str, torch.Tensor]:
    return {name: whole(weight) for name, weight in weights.items()}


def whole(weight: LeavingWeight) -> torch.Tensor:
    return weight.value(*(parameter.detach() for parameter in weight.parameters))


@pytest.mark.parametrize("student", ["tiny_student", "tiny_untied_student"])
def test_fresh_adapters_change_nothing_and_the_head_stays_frozen(student: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(student)
    base, model = load_causal_lm(str(folder), "float32"), adapted(folder, fresh=True)
    assert torch.equal(logits(model), logits(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (student == "tiny_student")
    assert torch.equal(head, base.get_output_embeddings().weight)
    assert stream(whole_weights(model)).keys() == dict(base.named_parameters()).keys()


def test_a_seed_decides_the_adapter_alone(tiny_student: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (stream(adapter_weights(adapted(tiny_student, fresh=True))) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    other = load_causal_lm(str(tiny_student), "float32")
    inject_lora(other, lora(), seed=2)
    assert any(not torch.equal(tensor, one[name]) for name, tensor in stream(adapter_weights(other)).items())


def test_a_frozen_base_keeps_its_dtype_and_merging_is_in_float32(tiny_student: Path) -> None:
    model = adapted(tiny_student, "bfloat16", alpha=8.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    adapter, name = stream(adapter_weights(model)), "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    base = model.get_submodule(name).get_base_layer().weight
    old = base.clone()
    for _ in range(3):  # merging again and again changes nothing
        merged = whole(whole_weights(model)[f"{name}.weight"])
    assert merged.dtype == torch.float32 and torch.equal(base, old)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert torch.allclose(merged.double(), old.double() + 2.0 * b @ a, rtol=0, atol=1e-7)  # pyright: ignore


@pytest.mark.parametrize("student", ["tiny_student", "tiny_untied_student"])
@pytest.mark.parametrize(
    "keys", [{}, {"target_modules": ["q_proj", "v_proj"], "rank_stabilized": True}, {"rank": 3, "alpha": 1.5}]
)
def test_what_is_written_loads_and_agrees(
    student: str, keys: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Merged through transformers, and the adapter through peft over the base model."""
    from peft import PeftModel

    source = request.getfixturevalue(student)
    model = adapted(source, **keys)
    card = ModelCard("t", "s", {"kind": "jsd"}, {}, "d", 1, {}, lora=lora(**keys))
    final = save_final(
        tmp_path / "final",
        stream(whole_weights(model)).items(),
        source,
        "float32",
        card,
        probe=probe(model),
        adapter=stream(adapter_weights(model)).items(),
    )
    expected = logits(model)
    assert (expected - logits(load_causal_lm(str(source), "float32"))).abs().max() > 0.05
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(final)), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(source)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, str(final / "adapter"))), expected, atol=1e-5)
    assert json.loads((final / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
    readme = (final / "README.md").read_text()
    assert "| Trained by LoRA | rank" in readme and 'from_pretrained(base_model, "adapter")' in readme


def test_own_head_and_a_wrong_scale(tmp_path: Path) -> None:
    """A merge keeps the head that its base model has, and an adapter that would act otherwise is refused."""
    source = claim_tied(save_tiny_model(tmp_path / "source", tied=False))
    model = adapted(source)

    def save(alpha: float) -> Path:
        card = ModelCard("t", "s", {"kind": "jsd"}, {}, "d", 1, {}, lora=lora(alpha=alpha))
        whole, adapter = (stream(of(model)).items() for of in (whole_weights, adapter_weights))
        return save_final(tmp_path / "final", whole, source, "float32", card, probe=probe(model), adapter=adapter)

    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(save(lora().alpha))), logits(model), atol=1e-4)
    with pytest.raises(CheckpointError, match=r"^the adapter over its base model, loaded again, gives"):
        save(3 * lora().alpha)


@pytest.mark.parametrize("target", ["qproj", "lm_head", "embed_tokens", "proj", "norm"])
def test_a_target_that_is_none_is_refused_before_loading(tiny_student: Path, target: str) -> None:
    model = empty_model(AutoConfig.from_pretrained(tiny_student))
    with pytest.raises(ConfigError, match=rf"^student\.lora\.target_modules: .* {target!r} .*; known: q_proj, k_proj"):
        lora_targets(model, lora(target_modules=["q_proj", target]))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"student": {"lora": {"rank": 0}}}, r"student\.lora\.rank: input should be greater"),
        ({"student": {"lora": {"rang": 4}}}, r"student\.lora\.rang: unknown key; did you mean student\.lora\.rank\?"),
        ({"student": {"lora": {"target_modules": []}}}, r"student\.lora\.target_modules"),
        ({"rollout": {"lora_sync": "adapter"}}, r"rollout\.lora_sync: adapter needs student\.lora, which is null"),
    ],
)
def test_keys_are_checked(section: dict[str, Any], message: str) -> None:
    values = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}
    for name, keys in section.items():
        values[name] = {**values.get(name, {}), **keys}
    with pytest.raises(ConfigError, match=message):
        make_config(values)


@pytest.mark.parametrize("shipped", ["Qwen3-1.7B", "SmolLM2-135M-Instruct"])
def test_the_planner_counts_what_is_injected(shipped: str) -> None:
    path = SHIPPED / f"{shipped}.json"
    values = json.loads(path.read_text())
    model = empty_model(AutoConfig.for_model(**values))
    linear = [model.get_submodule(name) for name in lora_targets(model, lora())]
    counted = sum(4 * (module.in_features + module.out_features) for module in linear)  # pyright: ignore
    assert read_architecture(values, shipped, "student.model").adapter_parameters(lora()) == counted
    assert setup_of("qwen3_8b_to_1.7b", 8).adapter_parameters == 0
