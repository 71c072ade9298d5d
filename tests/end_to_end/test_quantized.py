"""A student of four bits: sampled with, resumed bitwise, exported packed, and what others make of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_runs import STEPS, Bare, StopsInTheMiddle, ran, without_times
from launching import MakeConfig, check, read_metrics, run_gkd

from gkd.config import Config, make_config
from gkd.models import load_causal_lm

QUANTIZE = {"scheme": "int4", "group_size": 32}


class LooksAtTheSampler(Bare):
    """Keeps what the sampler holds after each step."""

    def save(self, steps_done: int) -> None:
        super().save(steps_done)
        sampler: Any = self.sampler
        while not hasattr(sampler, "_model"):
            sampler = sampler._sampler
        held = dict(sampler._model.named_parameters())
        for name, tensor in self.student.whole_weights():
            assert held[name].equal(tensor), name
        group = held["model.layers.0.mlp.up_proj.weight"].unflatten(-1, (-1, 32))[0, 0]
        assert len(group.unique()) <= 16


def base(student: Path, data: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(student), "dtype": "float32", "quantize": QUANTIZE},
        "data": {"train": str(data / "train.jsonl"), "heldout": str(data / "heldout.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 6},
        "optim": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
        "eval": {"prompts": 2, "samples": 1},
    }


@pytest.mark.usefixtures("sampling_here")
@pytest.mark.parametrize("weights", ["initial", "ema"])
def test_it_begins_as_its_own_teacher_and_reference(weights: str, tmp_path: Path, tiny_student: Path) -> None:
    """Both are rounded as it is. The teacher's prompt is the student's."""
    for name in ("train", "heldout"):
        rows = [{"prompt": f"say {i}", "teacher_prompt": f"say {i}"} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **base(tiny_student, tmp_path),
        "run": {"dir": str(tmp_path / "run"), "steps": STEPS},
        "teacher": {"model": "student", "weights": weights, "dtype": "float32"},
        "objective": {"terms": [{"kind": "forward_kl"}, {"kind": "reference_kl"}]},
    }
    records, _ = ran(Bare, make_config(config))
    for term in ("forward_kl", "reference_kl"):
        assert abs(float(records[0][f"objective/{term}/loss"])) < 1e-6, "0.2 against weights that are not rounded"


@pytest.mark.usefixtures("sampling_here")
def test_it_samples_what_is_deployed_and_resumes_bitwise(
    tmp_path: Path, data_folder: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    def config(name: str) -> Config:
        return make_config(
            {
                **base(tiny_student, data_folder),
                "run": {"dir": str(tmp_path / name), "steps": STEPS, "save_every": 1},
                "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            }
        )

    whole, weights = ran(LooksAtTheSampler, config("whole"))
    first, _ = ran(StopsInTheMiddle, config("halves"))
    second, resumed = ran(Bare, config("halves"), resume=True)
    assert without_times([*first, *second]) == without_times(whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items()) and weights


@pytest.mark.slow
@pytest.mark.vllm
def test_a_run_from_start_to_packed_result(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """vLLM samples with the rounded weights, and reads the packed ones."""
    config = make_run_config(
        rollout={"engine": "vllm"}, run={"steps": 3}, optim={"lr": 5e-3}, student={"quantize": QUANTIZE}
    )
    check(run_gkd(["train", config]))
    run = tmp_path / "tiny"
    assert all(r["sync/max_logprob_error"] < 1e-4 for r in read_metrics(run)), "float32: exact to rounding"
    final = run / "final"
    assert json.loads((final / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    model = load_causal_lm(str(final), "float32", may_be_packed=True)
    assert len(model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, :32].unique()) <= 16
    evaluated = check(run_gkd(["eval", run / "config.resolved.json", "--only", "task", "--format", "json"]))
    forward_kl = json.loads(evaluated.stdout.splitlines()[-1])["task"]["figures"]["forward_kl"]
    summary = json.loads((run / "summary.json").read_text())
    assert forward_kl["student_after"]["value"] == pytest.approx(summary["heldout_forward_kl_after"], rel=1e-4)
    answers = check(run_gkd(["generate", final, "--prompt", "hello", "--dtype", "float32", "--max-new-tokens", "8"]))
    assert answers.stdout.startswith("> hello\n")
