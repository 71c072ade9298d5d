"""A student of some of the teacher's layers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gkd.errors import ModelError
from gkd.models import (
    choose_layers,
    config_of_layers,
    load_causal_lm,
    load_tokenizer,
    make_student_from_layers,
    read_config,
    read_generation_config,
)
from gkd.serving.sampler_protocol import architecture_digest

IDS = torch.arange(3, 40)[None]


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_causal_lm(str(folder), "float32")(IDS).logits


def _save(folder: Path, model_type: str, **settings: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "pad_token_id": 0,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2}  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | settings)))
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("layers", "available", "chosen"),
    [
        (1, 5, [0]),
        (2, 5, [0, 4]),
        (3, 5, [0, 2, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (20, 30, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]),
        ([1, 3], 5, [1, 3]),
    ],
)
def test_which_layers(layers: int | list[int], available: int, chosen: list[int]) -> None:
    assert choose_layers(layers, available) == chosen


def test_a_count_gives_as_many_with_both_ends() -> None:
    for available in range(2, 40):
        for count in range(2, available + 1):
            chosen = choose_layers(count, available)
            assert len(set(chosen)) == count
            assert (chosen[0], chosen[-1]) == (0, available - 1)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (0, "must be 1 to 4"),
        (-2, "must be 1 to 4"),
        (5, "5 of a model of 4 layers; must be 1 to 4"),
        ([], "list some of 0 to 3"),
        ([0, 4], "layer 4 does not exist; the model has 0 to 3"),
        ([-1], "layer -1 does not exist"),
        ([0, 0], "layer 0 stands twice"),
        ([2, 1], "layer 1 stands after 2"),
    ],
)
def test_layers_that_do_not_fit(tiny_teacher: Path, tmp_path: Path, layers: int | list[int], problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        make_student_from_layers(tiny_teacher, layers, tmp_path / "student")
    assert str(caught.value).startswith("student.init.layers: ")
    assert problem in str(caught.value)
    assert not (tmp_path / "student").exists()


def test_all_layers_are_the_same_model(tiny_teacher: Path, tmp_path: Path) -> None:
    student = make_student_from_layers(tiny_teacher, 4, tmp_path / "student")
    assert torch.equal(_logits(student), _logits(tiny_teacher))


@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 3]), (3, [0, 2, 3]), ([1, 2], [1, 2])])
def test_the_same_as_picking_by_hand(
    tiny_teacher: Path, tmp_path: Path, layers: int | list[int], kept: list[int]
) -> None:
    by_hand = load_causal_lm(str(tiny_teacher), "float32")
    picked = torch.nn.ModuleList(by_hand.model.layers[layer] for layer in kept)  # pyright: ignore
    for index, layer in enumerate(picked):
        layer.self_attn.layer_idx = index  # pyright: ignore
    by_hand.model.layers = picked
    by_hand.config.num_hidden_layers = len(kept)

    folder = make_student_from_layers(tiny_teacher, layers, tmp_path / "student")
    student = load_causal_lm(str(folder), "float32")
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, by_hand(IDS).logits)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == list(range(len(kept)))  # pyright: ignore
    assert student.config.num_hidden_layers == len(kept)


def test_tokenizer_generation_config_and_dtype_come_along(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = make_student_from_layers(tiny_teacher, 2, tmp_path / "student")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.get_vocab() == load_tokenizer(str(tiny_teacher)).get_vocab()
    assert tokenizer.chat_template
    assert read_generation_config(str(folder)) is not None
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((folder / "student_init.json").read_text())["layers"] == [0, 3]


def test_made_once_again_for_other_layers_never_over_something_else(tiny_teacher: Path, tmp_path: Path) -> None:
    target = tmp_path / "student"
    make_student_from_layers(tiny_teacher, 2, target)
    first = (target / "config.json").stat().st_mtime_ns
    assert make_student_from_layers(tiny_teacher, [0, 3], target) == target
    assert (target / "config.json").stat().st_mtime_ns == first
    make_student_from_layers(tiny_teacher, 3, target)
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 3

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("precious")
    with pytest.raises(ModelError, match=r"^student\.init\.layers: .* holds files that are not a student"):
        make_student_from_layers(tiny_teacher, 2, other)
    assert (other / "chapter1.tex").read_text() == "precious"


@pytest.mark.fault
def test_cut_short(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gkd.models import subset

    def disk_full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(subset, "write_weights", disk_full)
        with pytest.raises(OSError, match="No space left"):
            make_student_from_layers(tiny_teacher, 2, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".student.0123abcd.partial").mkdir()  # as a killed process leaves it
    assert _logits(make_student_from_layers(tiny_teacher, 2, tmp_path / "student")).isfinite().all()


def test_kinds_of_layers_go_with_their_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = _save(tmp_path / "teacher", "gemma2", sliding_window=8)
    kinds = json.loads((teacher / "config.json").read_text())["layer_types"]
    with caplog.at_level(logging.WARNING, "gkd"):
        student = make_student_from_layers(teacher, [1, 2, 5], tmp_path / "student")
    assert json.loads((student / "config.json").read_text())["layer_types"] == [kinds[1], kinds[2], kinds[5]]
    assert [layer.self_attn.sliding_window == 8 for layer in load_causal_lm(str(student), "float32").model.layers] == [
        kinds[i] == "sliding_attention" for i in (1, 2, 5)
    ]  # pyright: ignore
    assert not caplog.records
    foretold = config_of_layers(teacher, [1, 2, 5])
    assert architecture_digest(foretold) == architecture_digest(read_config(str(student)))
    everything = make_student_from_layers(teacher, 6, tmp_path / "all")
    assert torch.equal(_logits(everything), _logits(teacher))


def test_a_mixture_of_experts_with_a_dense_layer(tmp_path: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    teacher = _save(tmp_path / "teacher", "qwen3_moe", mlp_only_layers=[3], **experts)
    student = make_student_from_layers(teacher, [0, 3, 5], tmp_path / "student")
    assert json.loads((student / "config.json").read_text())["mlp_only_layers"] == [1]
    assert _logits(student).isfinite().all()


def test_a_layer_of_another_kind_than_its_place(tmp_path: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
    teacher = _save(tmp_path / "teacher", "qwen3_moe", **experts)
    with pytest.raises(ModelError, match=r"^student\.init\.layers: layer 1 of this architecture cannot become layer 0"):
        make_student_from_layers(teacher, [1, 2], tmp_path / "student")
    with pytest.raises(ModelError, match="layer 1 of this architecture cannot become layer 0"):
        config_of_layers(teacher, [1, 2])
    assert not (tmp_path / "student").exists()


def test_other_names_for_layers(tmp_path: Path) -> None:
    teacher = _save(tmp_path / "teacher", "gpt2", n_embd=32, n_layer=4, n_head=2, num_hidden_layers=4)
    student = make_student_from_layers(teacher, 2, tmp_path / "student")
    assert json.loads((student / "config.json").read_text())["n_layer"] == 2
    assert _logits(student).isfinite().all()
