"""Weight files: complete or refused, written and read one tensor at a time."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkd.errors import ModelError
from gkd.models.weight_files import INDEX_FILE, SINGLE_FILE, check_model_folder, weight_files
from gkd.models.weights import read_tensors, write_weights

KEY = "teacher.model"


@pytest.fixture
def model(tiny_student: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_student, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    tensors = list(read_tensors(model, KEY))
    (model / SINGLE_FILE).unlink()
    write_weights(model, tensors, max_shard_bytes=50_000)
    assert len(weight_files(model, KEY)) > 2
    return model


def _refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder, KEY)
    message = str(caught.value)
    assert message.startswith("teacher.model: ")
    assert "\n" not in message
    return message


def test_a_whole_model_passes(model: Path) -> None:
    check_model_folder(model, KEY)


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 5_000])
def test_a_half_downloaded_file(model: Path, kept_bytes: int) -> None:
    file = model / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert "download the model again" in _refusal(model)


def test_a_file_that_lacks_its_last_byte(sharded: Path) -> None:
    file = weight_files(sharded, KEY)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in _refusal(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    file = weight_files(sharded, KEY)[1]
    file.unlink()
    assert f"lacks {file.name} of" in _refusal(sharded)


def test_a_shard_without_a_tensor_of_the_index(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.extra.weight"] = weight_files(sharded, KEY)[0].name
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert "lacks the tensors model.extra.weight" in _refusal(sharded)


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    assert "but neither" in _refusal(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a"}}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    assert INDEX_FILE in _refusal(sharded)


def test_pickled_weights_are_not_opened(model: Path) -> None:
    (model / SINGLE_FILE).rename(model / "pytorch_model.bin")
    assert "convert them to safetensors" in _refusal(model)


def _indexed(file: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}})


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        (
            INDEX_FILE,
            _indexed("a.safetensors"),
            f"remove {SINGLE_FILE} if the index's shards are the model, else the index",
        ),
        ("older.safetensors", "", "holds older.safetensors beside model.safetensors, and vLLM reads both; remove it"),
        ("consolidated.safetensors", "", "also holds consolidated.safetensors, which vLLM reads instead; remove it"),
        ("adapter_config.json", "{}", "holds adapter_config.json, whose adapter transformers would apply; remove it"),
    ],
)
def test_what_its_readers_would_read_differently(model: Path, name: str, content: str, refusal: str) -> None:
    (model / name).write_text(content)
    assert refusal in _refusal(model)


def test_a_weight_file_that_only_the_config_names(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert "transformers_weights names a file that only transformers reads; remove it" in _refusal(model)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = (load_file(file) for file in weight_files(sharded, KEY)[:2])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, weight_files(sharded, KEY)[1], metadata={"format": "pt"})
    assert f"both hold the tensor {name}" in _refusal(sharded)


@pytest.mark.vllm
def test_both_readers_take_the_files_that_are_named(sharded: Path) -> None:
    """Pickled copies and files that the index leaves out are left alone."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    (sharded / "pytorch_model.bin").touch()
    (sharded / "model-00009-of-00009.safetensors").touch()
    expected = sorted(str(file) for file in weight_files(sharded, KEY))
    found = _get_resolved_checkpoint_files(
        str(sharded), variant=None, gguf_file=None, use_safetensors=None, user_agent={}, is_remote_code=False
    )
    _, vllm_files, _, _ = DefaultModelLoader(LoadConfig())._prepare_weights(str(sharded), None, None, True, None)
    assert sorted(found[0] or ()) == sorted(vllm_files) == expected


def test_a_git_lfs_pointer(model: Path) -> None:
    (model / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in _refusal(model)


def test_no_weights_no_config_bad_config(model: Path) -> None:
    (model / SINGLE_FILE).unlink()
    assert "has no weights" in _refusal(model)
    (model / "config.json").write_text("{")
    assert "is not JSON" in _refusal(model)
    (model / "config.json").unlink()
    assert "has no config.json" in _refusal(model)
    (model / "adapter_config.json").write_text("{}")
    assert "merge it" in _refusal(model)


def test_tensors_may_be_views_of_one_reused_buffer(tmp_path: Path) -> None:
    buffer = torch.zeros(8)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for value in range(5):
            buffer.fill_(value)
            yield f"tensor.{value}", buffer[:4].view(2, 2)

    written_bytes = write_weights(tmp_path, stream(), torch.bfloat16, max_shard_bytes=16)
    assert written_bytes == 5 * 8
    assert len(weight_files(tmp_path, KEY)) == 3
    read = dict(read_tensors(tmp_path, KEY))
    for value in range(5):
        assert torch.equal(read[f"tensor.{value}"], torch.full((2, 2), value, dtype=torch.bfloat16))


def test_integers_keep_their_dtype_and_others_can_read(tmp_path: Path) -> None:
    write_weights(tmp_path, [("counts", torch.arange(3)), ("transposed", torch.rand(2, 3).T)], torch.float16)
    read = dict(read_tensors(tmp_path, KEY))
    assert (read["counts"].dtype, read["transposed"].dtype) == (torch.int64, torch.float16)
    assert stat.S_IMODE((tmp_path / SINGLE_FILE).stat().st_mode) & 0o044 == 0o044
