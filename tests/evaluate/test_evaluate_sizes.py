"""Sizes against the files' own headers, transformers' counts and torch's FLOP counter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from gkd.evaluate.evaluation import _flops
from gkd.evaluate.figures import Figure
from gkd.evaluate.sizes import compression_axis, parameter_counts


def header_sums(folder: Path) -> tuple[int, int]:
    """(parameters, bytes of the files), read without gkd."""
    parameters = size_bytes = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        for entry in header.values():
            parameters += torch.Size(entry["shape"]).numel()
        size_bytes += len(content)
    return parameters, size_bytes


def sharded(folder: Path, target: Path) -> Path:
    """The same model in several files."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="150KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    return target


def test_compression_is_what_the_files_hold(tiny_teacher: Path, tiny_untied_student: Path, tmp_path: Path) -> None:
    folders = {"teacher": sharded(tiny_teacher, tmp_path / "teacher"), "student_after": tiny_untied_student}
    rows = {row.name: row.cells for row in compression_axis(folders).rows}
    sums = {column: header_sums(folder) for column, folder in folders.items()}
    for column, (parameters, size_bytes) in sums.items():
        assert rows["parameters"][column] == Figure(parameters)
        assert rows["bytes"][column] == Figure(size_bytes)
        assert rows["parameters_of_teacher"][column] == Figure(parameters / sums["teacher"][0])
        assert rows["bytes_of_teacher"][column] == Figure(size_bytes / sums["teacher"][1])


@pytest.mark.parametrize("name", ["tiny_student", "tiny_untied_student"])
def test_parameters_and_flops_are_counted_exactly(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")  # its matmuls are counted
    total, inner = parameter_counts(folder)
    assert total == model.num_parameters()
    assert inner == sum(p.numel() for key, p in model.named_parameters() if ".layers." in key or ".norm." in key)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)
    assert _flops(folder, 1) == counter.get_total_flops()
