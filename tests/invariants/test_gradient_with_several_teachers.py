"""A batch of several teachers has one gradient, however it is cut: each token's is that of its own teacher, behind what
that one reads in the prompt's place.

The reference is autograd over full logits, written here without any of the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import check, run_python, torchrun
from safetensors.torch import load_file
from teachers_job import NAMES, TOP_K, routed_rollouts, view_of
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

JOB = Path(__file__).parent / "teachers_job.py"
TOLERANCE = 1e-5  # relative Frobenius error of each parameter's gradient, float32
Figures = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of hidden sizes 64, 128 and 64."""
    folder = tmp_path_factory.mktemp("teachers")
    sizes = {"narrow": 64, "wide": 128, "topk": 64}
    return [save_tiny_model(folder / name, seed=10 + i, hidden=sizes[name]) for i, name in enumerate(NAMES)]


def outcomes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of the tokens of `ids` and of all others together."""
    probabilities = logits.softmax(-1)
    return torch.cat([probabilities.gather(-1, ids), probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1)


def reference(student: Path, teachers: list[Path]) -> Figures:
    """In float64, one sequence at a time, from the definition."""
    s = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).train()
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        for name, path in zip(NAMES, teachers, strict=True)
    }
    losses, forward = [], {True: [], False: []}  # by whether the teacher tells its top k only
    entropy, agreement = [], []
    for rollout in routed_rollouts():
        if not rollout.completion_ids:
            continue
        ids, span = torch.tensor([rollout.token_ids]), slice(len(rollout.draw.prompt.token_ids) - 1, -1)
        name = rollout.draw.prompt.teacher
        logits = s(ids).logits[0, span]
        context = view_of(rollout.draw.prompt.index) or rollout.draw.prompt.token_ids
        read = torch.tensor([[*context, *rollout.completion_ids]])
        with torch.no_grad():
            teacher_logits = models[name](read).logits[0, -len(rollout.completion_ids) - 1 : -1]
        entropy.append(torch.distributions.Categorical(logits=logits.detach()).entropy())
        agreement.append((logits.argmax(-1) == teacher_logits.argmax(-1)).double())
        top = teacher_logits.topk(TOP_K if name == "topk" else 259, dim=-1).indices
        q, p = outcomes(logits, top).clamp(min=1e-300), outcomes(teacher_logits, top).clamp(min=1e-300)
        m = 0.5 * p + 0.5 * q
        losses.append((0.5 * p * (p / m).log() + 0.5 * q * (q / m).log()).sum(-1))
        forward[name == "topk"].append((p * (p / q).log()).sum(-1).detach())
    loss = torch.cat(losses).mean()
    loss.backward()
    return {
        "loss": loss.detach(),
        "divergence/forward_kl": torch.cat(forward[False]).mean(),
        "divergence/topk_forward_kl": torch.cat(forward[True]).mean(),
        "divergence/first_token_forward_kl": torch.stack([tokens[0] for tokens in forward[False]]).mean(),
        "divergence/first_token_topk_forward_kl": torch.stack([tokens[0] for tokens in forward[True]]).mean(),
        "entropy/student": torch.cat(entropy).mean(),
        "agreement/top1": torch.cat(agreement).mean(),
        **{name: p.grad for name, p in s.named_parameters() if p.grad is not None},
    }


def assert_matches(results: Figures, key: str, expected: Figures) -> None:
    names = {name.removeprefix(f"{key}/") for name in results if name.startswith(f"{key}/")}
    assert names == expected.keys()
    for name, wanted in expected.items():
        error = torch.linalg.norm(results[f"{key}/{name}"].double() - wanted) / torch.linalg.norm(wanted)
        assert error < TOLERANCE, f"split {key}, {name}: {error:.2e}"


@pytest.mark.slow
def test_one_rank(tmp_path: Path, tiny_student: Path, teachers: list[Path]) -> None:
    splits = [[8, 0], [4, 0], [2, 0], ["1000 tokens", 0], ["50 tokens", 2]]
    out = tmp_path / "out.safetensors"
    check(run_python([JOB, out, tiny_student, json.dumps([*map(str, teachers)]), json.dumps(splits)]))
    expected, results = reference(tiny_student, teachers), load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", expected)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["tiny_student", pytest.param("tiny_untied_student", marks=pytest.mark.long)])
def test_two_ranks_at_every_zero_stage(
    tmp_path: Path, student: str, teachers: list[Path], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(student)
    splits = [[4, 0], [2, 1], [2, 2], [2, 3], ["50 tokens", 3]]
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, folder, json.dumps([*map(str, teachers)]), json.dumps(splits)]))
    expected, results = reference(folder, teachers), load_file(out)
    for split, stage in splits:
        assert_matches(results, f"{split}/{stage}", expected)
