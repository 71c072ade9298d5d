"""The student as its own teacher: its live weights, their mean, and those below its adapter, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_job import LR
from launching import check, run_python, torchrun
from own_teacher_job import DECAY, told_rollouts
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from gkd.config import Config, make_config
from gkd.config.precision import dtype_choices
from gkd.data.views import check_teaches
from gkd.errors import CheckpointError, ConfigError, RunError
from gkd.models import load_causal_lm
from gkd.planning.models import architectures
from gkd.planning.setup import placement_of
from gkd.processor import ChosenDtype
from gkd.train.mean_weights import MeanWeights

JOB = Path(__file__).parent / "own_teacher_job.py"
PYTHONPATH = f"{JOB.parents[1]}:{JOB.parents[1] / 'invariants'}"
Weights = dict[str, torch.Tensor]


def logits(model: Any, weights: Weights, ids: list[int], tokens: int) -> torch.Tensor:
    return functional_call(model, weights, (torch.tensor([ids]),)).logits[0, -tokens - 1 : -1]


def gradient(model: Any, weights: Weights) -> Weights:
    """Of the forward KL from the student behind its teacher's contexts to itself, which alone is trained: float64."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    rollouts = [one for one in told_rollouts() if one.completion_ids]
    total = torch.zeros((), dtype=torch.float64)
    for one in rollouts:
        prompt, tokens = one.draw.prompt, len(one.completion_ids)
        teacher_ids = prompt.token_ids if prompt.teacher_ids is None else prompt.teacher_ids
        with torch.no_grad():
            teacher = logits(model, weights, [*teacher_ids, *one.completion_ids], tokens).log_softmax(-1)
        student = logits(model, leaves, [*prompt.token_ids, *one.completion_ids], tokens).log_softmax(-1)
        total = total + (teacher.exp() * (teacher - student)).sum()
    (total / sum(len(one.completion_ids) for one in rollouts)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_is_taught_by_itself(results: Weights, stage: int, student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    w0, w1, w2 = ({name: results[f"{stage}/{v}/{name}"].double() for name in names} for v in range(3))
    for before, after in ((w0, w1), (w1, w2)):
        for name, wanted in gradient(model, before).items():
            found = (before[name] - after[name]) / (LR / 1e4)
            assert torch.linalg.norm(found - wanted) < 1e-4 * torch.linalg.norm(wanted), f"ZeRO {stage}: {name}"
    for name in names:
        mean = DECAY * (DECAY * w0[name] + (1 - DECAY) * w1[name]) + (1 - DECAY) * w2[name]
        torch.testing.assert_close(results[f"{stage}/mean/{name}"].double(), mean, atol=1e-6, rtol=1e-6)
    for i, one in enumerate(told_rollouts()):
        ids = [*one.draw.prompt.read_by_teacher, *one.completion_ids]
        with torch.no_grad():
            expected = logits(model, w2, ids, len(one.completion_ids)).log_softmax(-1)
        torch.testing.assert_close(results[f"{stage}/said/{i}"].double(), expected, atol=1e-4, rtol=1e-4)
    assert results[f"{stage}/same/loss"].abs() < 1e-9 and results[f"{stage}/same/grad_norm"] < 1e-4


@pytest.mark.slow
def test_one_rank(tmp_path: Path, tiny_student: Path) -> None:
    out = tmp_path / "out.safetensors"
    check(run_python([JOB, out, tiny_student, "[0]"], PYTHONPATH=PYTHONPATH))
    assert_is_taught_by_itself(load_file(out), 0, tiny_student)


@pytest.mark.slow
def test_two_ranks_at_every_zero_stage(tmp_path: Path, tiny_untied_student: Path) -> None:
    out = tmp_path / "out.safetensors"
    check(torchrun(2, [JOB, out, tiny_untied_student, "[0, 1, 2, 3]"], PYTHONPATH=PYTHONPATH))
    for stage in range(4):
        assert_is_taught_by_itself(load_file(out), stage, tiny_untied_student)


@pytest.mark.fault
def test_a_mean_knows_its_version_and_its_tensors(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> None:
    class Stream(dict[str, torch.Tensor]):
        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in self.items()}

        def __iter__(self) -> Any:
            return iter([*self.items()])

    def stream(folder: Path) -> Any:
        return Stream(load_causal_lm(str(folder), "float32").named_parameters())

    def mean() -> MeanWeights:
        model = load_causal_lm(str(tiny_student), "float32")
        return MeanWeights(model, stream(tiny_student), name="main", decay=0.5, is_main=True)

    one = mean()
    one.check(0)
    one.follow(stream(tiny_student), 1)
    with pytest.raises(RunError, match="step 0 would be taught by a mean of the student's weights of version 1"):
        one.check(0)
    one.save_state(str(tmp_path))
    other = mean()
    other.load_state(str(tmp_path))
    other.check(1)
    for found, expected in zip(other.model.parameters(), one.model.parameters(), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(RunError, match="other tensors"):
        one.follow(stream(tiny_teacher), 2)
    with pytest.raises(CheckpointError, match=r"has no teacher_main\.safetensors"):
        one.load_state(str(tmp_path / "nowhere"))


def config(teacher: dict[str, Any], student: dict[str, Any] | None = None, **sections: Any) -> Config:
    return make_config(
        {
            "teacher": {"model": "student", **teacher},
            "student": {"model": "s", **(student or {})},
            "data": {"train": "rows.jsonl"},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("teacher", "sections", "message"),
    [
        ({"model": "t", "weights": "live"}, {}, "teacher.weights: is of a teacher that is the student"),
        ({"weights": "live", "decay": 0.9}, {}, "teacher.decay: is of weights: ema, not of live"),
        ({"placement": "served", "addresses": ["http://a:1"]}, {}, "teacher.placement: served has weights of its own"),
        ({"weights": "ema", "placement": "sharded"}, {}, "teacher.placement: sharded is for weights that stay"),
        ({"weights": "live", "cache_gib": 1.0}, {}, "teacher.cache_gib: 1.0 is for weights that stay"),
        ({"revision": "main"}, {}, "teacher.revision: is that of the student"),
        ({}, {"student": {"model": None, "init": {"layers": 2}}}, "student.model: null is the teacher"),
        ({"weights": "ema"}, {"mixture": {"student": 0.5, "teacher": 0.5}}, "teacher.weights: ema change, and the"),
        ({"weights": "live", "dtype": "float16"}, {}, "teacher.dtype: float16, but this teacher is computed by the"),
        ({"cache_gib": 1.0}, {"student": {"model": "s", "lora": {}}}, "teacher.cache_gib: 1.0, but this teacher is"),
        ({"weights": "live"}, {"objective": {"kind": "hidden_states"}}, "objective"),
        (
            {},
            {"mixture": {"student": 0.5, "mixed": 0.5}, "rollout": {"engine": "transformers"}},
            "teacher.model: student cannot draw the texts of mixture.mixed",
        ),
    ],
)
def test_what_such_a_teacher_cannot_be(teacher: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(teacher, **sections)
    assert str(error.value).removeprefix("config: ").startswith(message)


def test_where_nothing_could_be_learned(tmp_path: Path) -> None:
    same, told = [("main", False)] * 3, [("main", False), ("main", True)]
    for weights, when in (("live", "is 0"), ("initial", "begins at 0"), ("ema", "begins at 0")):
        check_teaches(config({"weights": weights}), told)
        with pytest.raises(ConfigError, match=rf"teacher\.weights: {weights}: .* every divergence {when}"):
            check_teaches(config({"weights": weights}), same)
    labels = {"terms": [{"kind": "forward_kl", "weight": 0.1}, {"kind": "cross_entropy", "on": ["dataset"]}]}
    mixture = {"student": 0.5, "dataset": 0.5}
    check_teaches(config({"weights": "initial"}, objective=labels, mixture=mixture), same)
    with pytest.raises(ConfigError, match=r"teacher\.weights: live"):
        check_teaches(config({"weights": "live"}, objective=labels, mixture=mixture), same)
    others = {"other_teachers": {"big": {"model": "b", "weight": 0.5}}}
    check_teaches(config({"weights": "ema"}, **others), same)
    check_teaches(make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}), same)


def test_it_is_in_the_students_dtype_and_in_the_plan() -> None:
    fastest = ChosenDtype("bfloat16", "it is fast")
    assert dtype_choices(config({}, {"dtype": "float32"}), fastest)["teacher.dtype"].value == "float32"
    assert dtype_choices(config({}), fastest)["teacher.dtype"].value == "bfloat16"
    assert [placement_of(config({"weights": w})) for w in ("initial", "live", "ema")] == ["local", "student", "mean"]
    assert placement_of(config({}, {"lora": {}})) == "student"
    real = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    student, teacher = architectures(config({}, real))
    assert student == teacher and student.layers == 30
