"""Layers that torch.compile has compiled train the same student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY, check, run_python

from gkd.config import make_config
from gkd.config.deepspeed import deepspeed_config
from gkd.config.training import TrainingSettings
from gkd.errors import ConfigError
from gkd.models import load_causal_lm
from gkd.models.compiled import compile_layers, only_in_training

JOB = Path(__file__).parent / "compile_job.py"
PYTHONPATH = ":".join(str(REPOSITORY / folder) for folder in ("tests", "tests/invariants", "tests/train"))


@pytest.mark.slow
def test_steps_are_those_of_the_layers_as_they_are(tmp_path: Path, tiny_student: Path) -> None:
    """One graph for all layers, compiled before the first step, not again for other lengths. A resume is bitwise, and
    what asks for no gradient runs without it."""
    out = check(run_python([JOB, tmp_path, tiny_student], PYTHONPATH=PYTHONPATH)).stdout
    results = json.loads(out.splitlines()[-1])
    for setup, found in results.items():
        for compiled, eager, *resumed in found["steps"]:
            assert compiled == pytest.approx(eager, rel=2e-6), setup
            assert not resumed or resumed[0] == compiled, setup
        assert found["graphs_in_steps"] == 0, setup
        assert found["weights_are_equal"] and found["proofs_are_eager"], setup
    assert [found["graphs_at_start"] for found in results.values()] == [1, 2], "one a setup"


def test_where_nothing_can_compile(tiny_student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    student = load_causal_lm(str(tiny_student), "float32")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"^student\.compile: .* none of c\+\+, g\+\+, clang\+\+ is in PATH"):
            compile_layers(student, "student.compile")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match=r"^student\.compile: .* TORCHDYNAMO_DISABLE is set; set it to false"):
        compile_layers(student, "student.compile")


def test_only_training_is_compiled() -> None:
    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    with only_in_training():
        assert stance() == "default"
    with torch.no_grad(), only_in_training():
        assert stance() == "force_eager"
    assert stance() == "default"


def test_what_it_does_not_go_with(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "teacher": {"model": "t"},
        "student": {"model": "s", "compile": True},
        "data": {"train": "d.jsonl"},
        "optim": {"micro_batch_tokens": 4096},
    }
    with pytest.raises(ConfigError, match=r"student\.compile: packed sequences would be compiled again"):
        make_config(values)
    states = {**values, "optim": {}, "objective": {"terms": [{"kind": "forward_kl"}, {"kind": "hidden_states"}]}}
    with pytest.raises(ConfigError, match=r"student\.compile: objective\.terms\.1 \(hidden_states\) reads states"):
        make_config(states)
    with pytest.raises(ConfigError, match=r"student\.compile: ZeRO-3 gathers weights inside the layers"):
        deepspeed_config(TrainingSettings.model_validate({"compile": True, "deepspeed": {"zero_stage": 3}}), 1)
