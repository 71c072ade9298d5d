"""A LoRA student in the engine: its gradient, what is frozen, what leaves it, and what a run makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gradient_job import ragged_rollouts
from launching import check, run_gkd, run_python, torchrun
from lora_job import LORA, SCALE, lora_student
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from gkd.config.training import TrainingSettings
from gkd.models import adapter_parameters

JOB = Path(__file__).parent / "lora_job.py"
PYTHONPATH = f"{JOB.parents[1]}:{JOB.parents[1] / 'invariants'}"
TOLERANCE = 1e-5  # relative Frobenius error of each adapter's gradient, float32
SPLITS = [[4, 0], [2, 1], [2, 2], [2, 3], ["50 tokens", 3]]
Adapter = dict[str, torch.Tensor]


def start_of(student: Path) -> Adapter:
    """The adapter that the job's students start with, float64."""
    model = lora_student(str(student), "float32", TrainingSettings())
    return {name: parameter.detach().double() for name, parameter in adapter_parameters(model).items()}


def merged(base: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """W + scale * B A, by the definition."""
    found = dict(base)
    for name in adapter:
        if ".lora_A." in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            delta = adapter[name.replace(".lora_A.", ".lora_B.")] @ adapter[name]
            found[weight] = base[weight] + SCALE * delta
    return found


def reference(student: Path, teacher: Path, adapter: Adapter) -> tuple[float, Adapter]:
    """Loss (forward KL) and gradients in float64, one sequence at a time, without peft and without the engine."""
    s = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    t = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    weights = merged({name: p.detach() for name, p in s.named_parameters()}, leaves)
    rollouts = [r for r in ragged_rollouts() if r.completion_ids]
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        ids, span = torch.tensor([rollout.token_ids]), slice(len(rollout.draw.prompt.token_ids) - 1, -1)
        student_log = functional_call(s, weights, (ids,)).logits[0, span].log_softmax(-1)
        with torch.no_grad():
            teacher_log = t(ids).logits[0, span].log_softmax(-1)
        total = total + (teacher_log.exp() * (teacher_log - student_log)).sum()
    total = total / sum(len(r.completion_ids) for r in rollouts)
    total.backward()
    return total.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run_job(
    folder: Path, student: Path, teacher: Path, splits: Sequence[Sequence[int | str]], *dtype: str
) -> dict[str, torch.Tensor]:
    out = folder / "out.safetensors"
    check(torchrun(2, [JOB, out, student, teacher, json.dumps(splits), *dtype], PYTHONPATH=PYTHONPATH))
    return load_file(out)


def part(results: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in results.items() if name.startswith(prefix)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected)).item()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["tiny_student", pytest.param("tiny_untied_student", marks=pytest.mark.long)])
def test_one_gradient_and_whole_weights_at_every_split(
    tmp_path: Path, student: str, tiny_teacher: Path, request: pytest.FixtureRequest
) -> None:
    """Two ranks. The job fails where a head's gradient is computed; splits of 4 recompute activations."""
    folder = request.getfixturevalue(student)
    results = run_job(tmp_path, folder, tiny_teacher, SPLITS)
    loss, gradients = reference(folder, tiny_teacher, start_of(folder))
    base = load_file(folder / "model.safetensors")
    for split, stage in SPLITS:
        found = part(results, f"{split}/{stage}/")
        assert found["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert part(found, "gradient/").keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = relative_error(found[f"gradient/{name}"], gradient)
            assert error < TOLERANCE, f"split {split}, ZeRO {stage}, {name}: {error:.2e}"
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values())).item()  # pyright: ignore
        assert found["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        whole, expected = part(found, "whole/"), merged(base, part(found, "adapter/"))
        assert whole.keys() == base.keys()
        for name, weight in whole.items():
            adapted = name.endswith("_proj.weight")
            assert adapted != torch.equal(weight, base[name]), f"{name}: only what has an adapter changes"
            assert relative_error(weight, expected[name].double()) < 1e-6


@pytest.mark.slow
@pytest.mark.long
def test_a_half_precision_base_under_float32_adapters(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> None:
    """The job checks the dtypes; each ZeRO stage takes the same step."""
    splits = [[2, stage] for stage in range(4)]
    results = run_job(tmp_path, tiny_student, tiny_teacher, splits, "bfloat16")
    loss, gradients = reference(tiny_student, tiny_teacher, start_of(tiny_student))
    for split, stage in splits:
        found = part(results, f"{split}/{stage}/")
        assert found["loss"].item() == pytest.approx(loss, rel=0.02)
        for name, gradient in gradients.items():
            assert relative_error(found[f"gradient/{name}"], gradient) < 0.2, f"ZeRO {stage}, {name}"


@pytest.mark.slow
def test_fresh_adapters_and_a_checkpoint_at_every_zero_stage(tmp_path: Path, tiny_student: Path) -> None:
    """A fresh student is its teacher: no loss and no gradient, dropout or not. A resumed step is the step, bitwise.

    Code that is planted in a file of the checkpoint is not run.
    """
    job = JOB.parent / "lora_state_job.py"
    out = check(run_python([job, tmp_path, tiny_student], PYTHONPATH=PYTHONPATH)).stdout
    base_bytes = (tiny_student / "model.safetensors").stat().st_size
    for setup, result in json.loads(out.splitlines()[-1]).items():
        assert result["fresh"][0] < 1e-9 and result["fresh"][1] < 1e-4, setup
        assert result["losses"] == sorted(result["losses"], reverse=True) and result["losses"][-1] > 0.1
        assert result["is_bitwise"], setup
        assert result["checkpoint_bytes"] < 0.6 * base_bytes, "what is frozen is in no checkpoint"
        assert result["refused"] == result["files"] > 0 and not result["code_ran"], setup


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param("transformers", marks=pytest.mark.long), pytest.param("vllm", marks=pytest.mark.vllm)]
)
def test_a_sampler_that_applies_the_adapter(tiny_student: Path, engine: str) -> None:
    job = JOB.parent / "lora_sampler_job.py"
    out = check(run_python([job, tiny_student, engine], PYTHONPATH=PYTHONPATH)).stdout
    result = json.loads(out.splitlines()[-1])
    assert max(result["errors"]) < 1e-4, "also after the faults"
    first, second, third = result["completions"]
    assert first != second and second != third
    refusal = "vLLM refuses the adapter" if engine == "vllm" else "1 not sent, the first is base_model.model"
    assert refusal in result["caught"]["missing"]
    assert "log-probabilities differ from the trainer's" in result["caught"]["negated"]
    assert result["left"] == []


@pytest.mark.slow
def test_a_run_resumes_bitwise_and_leaves_model_and_adapter(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    rows = [{"prompt": f"row {i}", "completion": "y" * (1 + i % 5)} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name: str, *overrides: str) -> str:
        values = {
            "run": {"name": name, "dir": str(tmp_path / name), "steps": 2, "save_every": 1},
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32", "lora": LORA},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 64},
            "rollout": {"engine": "transformers", "max_new_tokens": 8, "lora_sync": "adapter"},
            "optim": {"lr": 1e-2, "batch_size": 4, "micro_batch_size": 4},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        run = run_gkd(["train", tmp_path / f"{name}.yaml", *overrides], GKD_CACHE=str(tmp_path / "cache"))
        return check(run).stdout

    train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step_2")
    assert "resumed at step 1" in train("halves", "--resume", "run.name=whole")
    whole, resumed = (tmp_path / name / "final" for name in ("whole", "halves"))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = load_file(whole / file), load_file(resumed / file)
        assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items()), file
    base, adapter = (
        load_file(tiny_student / "model.safetensors"),
        load_file(whole / "adapter/adapter_model.safetensors"),
    )
    expected = merged(base, adapter)
    for name, weight in load_file(whole / "model.safetensors").items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
        assert name.endswith("_proj.weight") != torch.equal(weight, base[name])
    assert "Trained by LoRA" in (whole / "README.md").read_text()
    wrong = run_gkd(["train", tmp_path / "whole.yaml", "--overwrite", "student.lora.target_modules=[qproj]"])
    assert wrong.returncode == 2
    assert "student.lora.target_modules: LlamaForCausalLM has no linear module 'qproj'" in wrong.stderr
