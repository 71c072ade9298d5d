"""Weights that are not those of their architecture are refused from headers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from gkd.config import make_config
from gkd.errors import ModelError
from gkd.models import check_covers
from gkd.train.distiller import Distiller

Tensors = dict[str, torch.Tensor]


def changed(model: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def wrap(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def unprefixed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def quantized(folder: Path, method: str) -> Path:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "quantization_config": {"quant_method": method, "bits": 4}}))
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers keeps a layer's experts in two tensors, the files have three an expert."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_whole_models(tmp_path: Path, tiny_teacher: Path, tiny_untied_student: Path, mixtral: Path) -> None:
    """A tied head needs no tensor; transformers adds a prefix that is missing, and fuses experts."""
    for folder in (tiny_teacher, tiny_untied_student, mixtral, changed(tiny_teacher, tmp_path / "bare", unprefixed)):
        check_covers(str(folder), key="teacher.model")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrap, r"was saved from torch\.compile's wrapper \(_orig_mod\.model\.embed_tokens\.weight\): save"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lack 1 tensors of LlamaForCausalLM, first .*up_proj"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"lack 1 tensors of LlamaForCausalLM, first .*embed_tokens"),
    ],
)
def test_what_is_not_whole(
    tmp_path: Path, tiny_student: Path, change: Callable[[Tensors], object], message: str
) -> None:
    folder = changed(tiny_student, tmp_path / "model", change)
    with pytest.raises(ModelError, match=f"^other_teachers.a.model: .*{message}"):
        check_covers(str(folder), key="other_teachers.a.model")


@pytest.mark.fault
def test_one_matrix_of_one_expert(tmp_path: Path, mixtral: Path) -> None:
    name = next(name for name in load_file(mixtral / "model.safetensors") if "experts.3.w2" in name)
    folder = changed(mixtral, tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"lack 1 tensors of MixtralForCausalLM, first {name}"):
        check_covers(str(folder), key="student.model")


@pytest.mark.fault
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("fault", ["quantized", "lacking"])
def test_a_dry_run_and_a_start_name_the_right_key(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path, which: str, fault: str
) -> None:
    good = {"teacher": tiny_teacher, "student": tiny_student}
    if fault == "quantized":
        bad = quantized(Path(shutil.copytree(good[which], tmp_path / "bad")), "a_new_method")
    else:
        bad = changed(good[which], tmp_path / "bad", lambda tensors: tensors.popitem())
    models: dict[str, Any] = {side: {"model": str(folder), "dtype": "float32"} for side, folder in good.items()}
    models[which]["model"] = str(bad)
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "a"}\n')
    config = make_config(
        {**models, "data": {"train": str(data)}, "run": {"dir": str(tmp_path / "run")},
         "rollout": {"engine": "transformers", "max_new_tokens": 4}, "optim": {"batch_size": 1, "micro_batch_size": 1},
         "mixture": {"teacher": 1.0, "student": 0.0}}
    )  # fmt: skip
    message = r"is quantized \(a_new_method\)" if fault == "quantized" else "the weights of .* lack 1 tensors"
    for start in (Distiller(config).check, Distiller(config).train):
        with pytest.raises(ModelError, match=rf"^{which}\.model: .*{message}"):
            start()
