"""Weight files: complete or refused, written and read one tensor at a time."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gkd.errors import ModelError
from gkd.models.weights import INDEX_FILE, SINGLE_FILE, check_model_folder, check_weights, read_tensors, write_weights

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
    assert len(check_weights(model, KEY)) > 2
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
    file = check_weights(sharded, KEY)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in _refusal(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    file = check_weights(sharded, KEY)[1]
    file.unlink()
    assert f"lacks {file.name} of" in _refusal(sharded)


def test_a_shard_without_a_tensor_of_the_index(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.extra.weight"] = check_weights(sharded, KEY)[0].name
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
    assert len(check_weights(tmp_path, KEY)) == 3
    read = dict(read_tensors(tmp_path, KEY))
    for value in range(5):
        assert torch.equal(read[f"tensor.{value}"], torch.full((2, 2), value, dtype=torch.bfloat16))


def test_integers_keep_their_dtype_and_others_can_read(tmp_path: Path) -> None:
    write_weights(tmp_path, [("counts", torch.arange(3)), ("transposed", torch.rand(2, 3).T)], torch.float16)
    read = dict(read_tensors(tmp_path, KEY))
    assert (read["counts"].dtype, read["transposed"].dtype) == (torch.int64, torch.float16)
    assert stat.S_IMODE((tmp_path / SINGLE_FILE).stat().st_mode) & 0o044 == 0o044
