"""One global batch of ragged lengths has one gradient, however it is cut into micro-batches, ranks and shards.

For every kind of term and token weight, alone and beside others.

The reference is autograd over full logits in float64, written in `objectives_reference.py` without any of the engine.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_job import OBSERVED
from launching import check, run_python, torchrun
from objectives_reference import OBJECTIVES, OF_A_WIDE_TEACHER, reference
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from gkd.config import QuantizeConfig
from gkd.models import Quantization

JOB = Path(__file__).parent / "gradient_job.py"
TOLERANCE = 1e-5  # relative Frobenius error of each parameter's gradient, float32
SOME = {name: OBJECTIVES[name] for name in ("hinton", "entropy aware")}

truth = cache(lambda student, teacher, name: reference(student, teacher, (OBJECTIVES | OF_A_WIDE_TEACHER)[name], name))


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "teacher", seed=4, layers=4, hidden=96)


def assert_matches(results: dict[str, torch.Tensor], key: str, student: Path, teacher: Path, name: str) -> None:
    loss, gradients, values = truth(student, teacher, name)
    assert results[f"{key}: loss"].item() == pytest.approx(loss, rel=1e-5, abs=1e-8)
    for term, value in values.items():
        assert results[f"{key}: objective/{term}/loss"].item() == pytest.approx(value, rel=1e-5), (key, term)
    names = {name.removeprefix(f"{key}/") for name in results if name.startswith(f"{key}/")}
    assert names == gradients.keys()
    for parameter, expected in gradients.items():
        error, size = torch.linalg.norm(results[f"{key}/{parameter}"].double() - expected), torch.linalg.norm(expected)
        assert error <= TOLERANCE * size, f"{key}, {parameter}: {error:.2e} of {size:.2e}"
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))  # pyright: ignore
    assert results[f"{key}: grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    observed = sum(end - start for spans in OBSERVED.values() for start, end in spans)
    assert results[f"{key}: tokens/scored"].item() == 125 - observed * name.startswith("conversations")


def assert_all_match(
    out: Path, splits: list[list[Any]], objectives: dict[str, Any], student: Path, teacher: Path
) -> None:
    results = load_file(out)
    for name in objectives:
        for split, stage in splits:
            assert_matches(results, f"{name}/{split}/{stage}", student, teacher, name)


@pytest.mark.slow
def test_micro_batches(tmp_path: Path, tiny_student: Path, tiny_teacher: Path, wide_teacher: Path) -> None:
    splits = [[8, 0], [2, 0], ["64 tokens", 0]]
    out = tmp_path / "out.safetensors"
    job = [JOB, out, tiny_student, tiny_teacher, json.dumps(splits), json.dumps(OBJECTIVES)]
    check(run_python([*job, wide_teacher, json.dumps(OF_A_WIDE_TEACHER)]))
    assert_all_match(out, splits, OBJECTIVES, tiny_student, tiny_teacher)
    assert_all_match(out, splits, OF_A_WIDE_TEACHER, tiny_student, wide_teacher)


@pytest.mark.slow
def test_two_ranks_at_every_zero_stage(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, wide_teacher: Path
) -> None:
    splits = [[2, 0], ["50 tokens", 1], [4, 2], [2, 3], ["50 tokens", 3]]
    out = tmp_path / "out.safetensors"
    job = [JOB, out, tiny_student, tiny_teacher, json.dumps(splits), json.dumps(OBJECTIVES)]
    check(torchrun(2, [*job, wide_teacher, json.dumps(OF_A_WIDE_TEACHER)]))
    assert_all_match(out, splits, OBJECTIVES, tiny_student, tiny_teacher)
    assert_all_match(out, splits, OF_A_WIDE_TEACHER, tiny_student, wide_teacher)
    k3 = [value.item() for name, value in load_file(out).items() if name.endswith("mismatch/k3") and "hinton" in name]
    assert k3 == pytest.approx([k3[0]] * len(k3), rel=1e-5)
    assert 0.02 < k3[0] < 0.08  # noise of 0.3: about 0.3^2 / 2


@pytest.mark.slow
def test_a_quantized_student(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> None:
    """Its gradient is that of a student whose weights are the rounded ones, straight through to the full ones."""
    quantize = QuantizeConfig.model_validate({"scheme": "int4", "group_size": 32})
    asked, rounded = tmp_path / "asked", tmp_path / "rounded"
    for folder in (asked, rounded):
        shutil.copytree(tiny_student, folder)
    (asked / "quantize.json").write_text(quantize.model_dump_json())
    weights, own = load_file(rounded / "model.safetensors"), Quantization.of(quantize, torch.float32)
    changed = {n: own.rounded(tensor) for n, tensor in weights.items() if n.endswith("_proj.weight")}
    save_file(weights | changed, rounded / "model.safetensors", metadata={"format": "pt"})
    splits = [[4, 0], ["50 tokens", 1], [2, 2], [2, 3]]
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, asked, tiny_teacher, json.dumps(splits), json.dumps(SOME)]))
    assert_all_match(out, splits, SOME, rounded, tiny_teacher)
    plain = truth(tiny_student, tiny_teacher, "hinton")[0]
    assert truth(rounded, tiny_teacher, "hinton")[0] != pytest.approx(plain, rel=1e-3), "or rounding changes nothing"


@pytest.mark.slow
@pytest.mark.long
def test_a_head_of_its_own(tmp_path: Path, tiny_untied_student: Path, tiny_teacher: Path) -> None:
    splits = [[4, 0], [2, 1], [2, 2], [4, 3], *(["50 tokens", stage] for stage in (0, 1, 2, 3))]
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, tiny_untied_student, tiny_teacher, json.dumps(splits), json.dumps(SOME)]))
    assert_all_match(out, splits, SOME, tiny_untied_student, tiny_teacher)


def test_weights_matter(tiny_student: Path, tiny_teacher: Path) -> None:
    """Or the tests above would hold for weights of 1."""
    for name, objective in OBJECTIVES.items():
        weighed = [term for term in objective.get("terms", [objective]) if "token_weight" in term]
        plain = {**objective, "terms": [{**t, "token_weight": {}} for t in objective.get("terms", [objective])]}
        if weighed and "terms" in objective:
            loss = reference(tiny_student, tiny_teacher, plain, name)[0]
            assert truth(tiny_student, tiny_teacher, name)[0] != pytest.approx(loss, rel=1e-3), name
