"""Layers chosen by what is measured of them, against models that are cut to files and run whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model, save_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gkd.errors import ModelError
from gkd.models import choose_by_measure, load_causal_lm, make_student_from_layers
from gkd.models.layer_choice import LayerChoice, LayerChooser

KEY = "student.init"
TEXTS = [tuple(range(3, 20)), tuple(range(200, 160, -3)), (7,)]


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("choice") / "model", seed=5, layers=5)


def _save(folder: Path, model_type: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2}  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def _chooser(folder: Path, dtype: str = "float64") -> LayerChooser:
    return LayerChooser(load_causal_lm(str(folder), dtype), TEXTS, KEY)


def _log_probs(folder: Path) -> torch.Tensor:
    """[tokens, V] float64 of all texts, by a full forward of the model in the folder."""
    model = load_causal_lm(str(folder), "float64")
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in TEXTS])


def _forward_kl(whole: Path, layers: list[int], scratch: Path) -> float:
    """Of a cut that is written to files and loaded again."""
    teacher = _log_probs(whole)
    student = _log_probs(make_student_from_layers(whole, layers, scratch))
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def _costs(chooser: LayerChooser, kept: list[int], places: list[int]) -> list[float]:
    """Of removing the layer at each of the places, as the search measures it."""
    sums = sum(chooser._forward_kl_sums(chooser._without_each(kept, places, p), p) for p in chooser._passages)
    return [float(one) / chooser.tokens for one in sums]  # pyright: ignore


def _without(layers: list[int], layer: int) -> list[int]:
    return [other for other in layers if other != layer]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma2", {"sliding_window": 8, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 2}),
    ],
)
def test_a_removal_costs_what_a_cut_model_shows(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    """One walk with the states reused, against as many models cut to files and run whole."""
    folder = _save(tmp_path / "model", model_type, **settings)
    kept, chooser = [0, 1, 3], _chooser(folder)
    true = [_forward_kl(folder, _without(kept, layer), tmp_path / "cut") for layer in kept]
    assert min(true) > 0.01
    assert _costs(chooser, kept, [0, 1, 2]) == pytest.approx(true, rel=1e-5)
    assert _costs(chooser, kept, [0, 2]) == pytest.approx([true[0], true[2]], rel=1e-5)
    place, cost = chooser.cheapest_removal(kept)
    assert (place, cost) == (true.index(min(true)), pytest.approx(min(true), rel=1e-5))


def test_greedy_removal_by_hand(five_layers: Path, tmp_path: Path) -> None:
    kept, removed = [0, 1, 2, 3, 4], []
    while len(kept) > 2:
        costs = {layer: _forward_kl(five_layers, _without(kept, layer), tmp_path / "cut") for layer in kept}
        cheapest = min(costs, key=costs.__getitem__)
        kept.remove(cheapest)
        removed.append((cheapest, costs[cheapest]))
    choice = _chooser(five_layers).by_divergence(2)
    assert list(choice.layers) == kept
    assert [one.layer for one in choice.removed] == [layer for layer, _ in removed]
    assert [one.figure for one in choice.removed] == pytest.approx([cost for _, cost in removed], rel=1e-5)
    assert choice.forward_kl == choice.removed[-1].figure


def test_block_influence_is_one_minus_the_cosine(five_layers: Path, tmp_path: Path) -> None:
    model = load_causal_lm(str(five_layers), "float64")
    sums = torch.zeros(5, dtype=torch.float64)

    def add(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        before, after = before[0], after[0]
        cosines = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        sums[layer] += (1 - cosines).sum()

    for index, layer in enumerate(model.model.layers):  # pyright: ignore
        layer.register_forward_hook(lambda _, args, output, index=index: add(index, args[0], output))
    with torch.no_grad():
        for ids in TEXTS:
            model(torch.tensor([ids]))
    influences = (sums / sum(map(len, TEXTS))).tolist()
    choice = _chooser(five_layers).by_block_influence(3)
    weakest = sorted(range(5), key=influences.__getitem__)[:2]
    assert [one.layer for one in choice.removed] == weakest
    assert [one.figure for one in choice.removed] == pytest.approx([influences[layer] for layer in weakest], rel=1e-6)
    assert list(choice.layers) == sorted(set(range(5)) - set(weakest))
    assert choice.forward_kl == pytest.approx(_forward_kl(five_layers, list(choice.layers), tmp_path / "cut"), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_in_less_precision_nearly_the_same(five_layers: Path, dtype: str, tolerance: float) -> None:
    kept = [0, 1, 2, 3, 4]
    exact = _costs(_chooser(five_layers), kept, kept)
    assert _costs(_chooser(five_layers, dtype), kept, kept) == pytest.approx(exact, rel=tolerance)


def test_the_model_is_left_as_it_was(five_layers: Path) -> None:
    model = load_causal_lm(str(five_layers), "float32")
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        before = model(ids).logits
        LayerChooser(model, TEXTS, KEY).by_divergence(3)
        assert torch.equal(model(ids).logits, before)


def test_layers_that_meet_elsewhere_are_refused(five_layers: Path) -> None:
    """A layer that does not do alone what it does in its place, as where layers share keys and values."""
    model = load_causal_lm(str(five_layers), "float32")
    layers = model.model.layers  # pyright: ignore
    memory: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda _, args, output: memory.append(args[0]))  # pyright: ignore
    layers[3].register_forward_hook(lambda _, __, output: output * len(memory))  # pyright: ignore
    with pytest.raises(ModelError, match=r"^student.init: LlamaModel with its layers called one by one gives other"):
        LayerChooser(model, TEXTS, KEY)


def test_a_choice_survives_json(five_layers: Path) -> None:
    choice = choose_by_measure(
        five_layers, "block_influence", 2, TEXTS, dtype="float32", device=torch.device("cpu"), key=KEY
    )
    assert LayerChoice.from_record(json.loads(json.dumps(choice.as_record()))) == choice
