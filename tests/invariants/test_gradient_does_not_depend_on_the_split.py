"""One global batch of ragged lengths has one gradient, however it is cut into micro-batches, ranks and shards.

The reference is autograd over full logits, written here without any of the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gradient_job import ragged_rollouts, with_sampler_logprobs
from launching import check, run_python, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gkd.types import Rollout

JOB = Path(__file__).parent / "gradient_job.py"

TOLERANCE = 1e-5  # relative Frobenius error of each parameter's gradient, float32
HARD_LABEL_WEIGHT = 0.3


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = 0.5 * p + 0.5 * q
    return (0.5 * p * (p.log() - m.log()) + 0.5 * q * (q.log() - m.log())).sum(-1)


def importance(rollout: Rollout, logits: torch.Tensor, level: str) -> torch.Tensor:
    """Truncated at 2; 1 where the student did not sample."""
    if level == "none" or rollout.logprobs is None:
        return torch.ones(len(rollout.completion_ids), dtype=torch.float64)
    own = logits.detach().log_softmax(-1).gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
    log_ratio = own - torch.tensor(rollout.logprobs, dtype=torch.float64)
    return (log_ratio if level == "token" else log_ratio.sum().expand_as(log_ratio)).exp().clamp(max=2.0)


def reference(
    student: Path, teacher: Path, reduction: str, level: str = "none"
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in float64, one sequence at a time, from the definition."""
    s = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).train()
    t = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    rollouts = [r for r in with_sampler_logprobs(ragged_rollouts(), s) if r.completion_ids]
    normalizer = sum(len(r.completion_ids) for r in rollouts) if reduction == "token_mean" else len(rollouts)
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        ids = torch.tensor([rollout.token_ids])
        span = slice(len(rollout.draw.prompt.token_ids) - 1, -1)
        logits = s(ids).logits[0, span]
        with torch.no_grad():
            teacher_logits = t(ids).logits[0, span]
        losses = jsd(logits, teacher_logits)
        if rollout.source == "dataset":
            hard = torch.nn.functional.cross_entropy(logits, torch.tensor(rollout.completion_ids), reduction="none")
            losses = (1 - HARD_LABEL_WEIGHT) * losses + HARD_LABEL_WEIGHT * hard
        losses = losses * importance(rollout, logits, level)
        total = total + (losses.sum() if reduction == "token_mean" else losses.mean()) / normalizer
    total.backward()
    return total.item(), {name: p.grad for name, p in s.named_parameters() if p.grad is not None}


def assert_matches(results: dict[str, torch.Tensor], key: str, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert results[f"{key}/loss"].item() == pytest.approx(loss, rel=1e-5)
    names = {name.removeprefix(f"{key}/") for name in results if name.startswith(f"{key}/") and "." in name}
    assert names == gradients.keys()
    for name, expected in gradients.items():
        error = torch.linalg.norm(results[f"{key}/{name}"].double() - expected) / torch.linalg.norm(expected)
        assert error < TOLERANCE, f"split {key}, {name}: {error:.2e}"
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))  # pyright: ignore
    assert results[f"{key}/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches(tmp_path: Path, tiny_student: Path, tiny_teacher: Path, reduction: str) -> None:
    splits = [[8, 0], [4, 0], [2, 0], ["1000 tokens", 0], ["64 tokens", 0], ["50 tokens", 2]]
    out = tmp_path / "out.safetensors"
    check(run_python([JOB, out, tiny_student, tiny_teacher, json.dumps(splits), reduction]))
    loss, gradients = reference(tiny_student, tiny_teacher, reduction)
    results = load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", loss, gradients)
        assert results[f"{split}/{stage}/scored"].item() == 125


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(tmp_path: Path, tiny_student: Path, tiny_teacher: Path, level: str) -> None:
    splits = [[8, 0], [2, 0], ["64 tokens", 0]]
    out = tmp_path / "out.safetensors"
    check(run_python([JOB, out, tiny_student, tiny_teacher, json.dumps(splits), "token_mean", level]))
    loss, gradients = reference(tiny_student, tiny_teacher, "token_mean", level)
    assert loss != pytest.approx(reference(tiny_student, tiny_teacher, "token_mean")[0], rel=1e-3)
    results = load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", loss, gradients)
        assert results[f"{split}/{stage}/k3"].item() == pytest.approx(results["8/0/k3"].item(), rel=1e-5)
        assert 0.02 < results[f"{split}/{stage}/k3"].item() < 0.08  # noise of 0.3: about 0.3^2 / 2


@pytest.mark.slow
@pytest.mark.parametrize("student", ["tiny_student", pytest.param("tiny_untied_student", marks=pytest.mark.long)])
def test_two_ranks_at_every_zero_stage(
    tmp_path: Path, student: str, tiny_teacher: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(student)
    splits = [[4, 0], [2, 0], [2, 1], [2, 2], [2, 3], [4, 3], *(["50 tokens", stage] for stage in (0, 1, 2, 3))]
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, folder, tiny_teacher, json.dumps(splits), "token_mean"]))
    loss, gradients = reference(folder, tiny_teacher, "token_mean")
    results = load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", loss, gradients)
