"""`gkd plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import check, run_gkd, run_python
from planned import PLANNED, REPOSITORY

from gkd.cli.plan import plan_command
from gkd.config import instruction_limits
from gkd.errors import ConfigError
from gkd.processor import fastest_dtype, this_cpu

KEYS = {
    "": "format student teacher setup fits faults memory suggestion time links sweeps comparison assumptions",
    "student": "name family layers hidden vocabulary parameters active_parameters forward_flops_a_token "
    "kv_bytes_a_token",
    "memory": "limit_bytes peak_bytes peak_phase resident_bytes phase_bytes phase_peak_bytes host_bytes "
    "host_limit_bytes sequences_at_once",
    "suggestion": "changes why setup memory",
    "time": "step_s phase_s cause_s bottleneck with_staleness tokens_a_step tokens_a_day price_a_million_tokens",
    "setup": "device devices all_devices batch_size micro_batch_size scoring_micro_batch_size zero_stage "
    "offload_optimizer offload_parameters checkpointing student_dtype teacher_dtype prompt_tokens completion_tokens "
    "max_prompt_tokens max_new_tokens student_share sampler_memory_share teacher_placement teacher_devices "
    "sampler_devices sleep_level sampler_replicas staleness head_products extra_forwards needs_reference "
    "projector_parameters state_widths together_share teacher_turns proposed_share",
}


def plan(*arguments: str | Path) -> str:
    return check(run_gkd(["plan", *arguments])).stdout


def plan_json(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(plan(*arguments, "--json"))


@pytest.mark.parametrize(
    ("name", "devices", "student", "teacher"),
    [("qwen3_32b_to_1.7b", 8, "1.72 B", "32.8 B"), ("qwen3_235b_to_8b", 128, "8.19 B", "22.2 B active")],
)
def test_large_runs_are_planned_with_every_assumption(name: str, devices: int, student: str, teacher: str) -> None:
    config = PLANNED / f"{name}.yaml"
    text = plan(config, "--gpus", str(devices), "--price-per-gpu-hour", "2.5")
    assert student in text and teacher in text
    assert "does not fit" in text and "the smallest change that fits" in text
    assert "planned for, not built" not in text
    assert "a million tokens at 2.5" in text
    assert "teacher.dtype, student.dtype: bfloat16, by auto: " in text
    listed = plan_json(config, "--gpus", str(devices))["assumptions"]
    assert len(listed) > 20
    for assumption in listed:
        assert assumption["name"] in text.partition("\nassumptions")[2]


def test_json_keys_stay() -> None:
    result = plan_json(PLANNED / "qwen3_32b_to_1.7b.yaml", "--gpus", "8", "--sweep")
    for path, names in KEYS.items():
        assert set(result[path] if path else result) == set(names.split()), path
    assert set(result["links"][0]) == {"name", "link", "bytes_a_step", "bytes_a_token", "seconds"}
    assert [sweep["mode"] for sweep in result["sweeps"]] == ["fixed batch", "batch grows"]
    assert set(result["sweeps"][0]["points"][0]) == {
        "devices", "all_devices", "batch_size", "fits", "step_s", "tokens_a_s", "efficiency", "bottleneck",
    }  # fmt: skip
    assert result["fits"] is False and result["time"]["price_a_million_tokens"] is None


def test_the_quickstart_against_a_record() -> None:
    record = REPOSITORY / "benchmarks" / "results" / "quickstart.json"
    lengths = ("--prompt-tokens", "49.4", "--completion-tokens", "45.7")
    result = plan_json("configs/quickstart.yaml", "--gpu", "cpu", *lengths, "--against", record)
    assert result["fits"] and result["suggestion"] is None
    assert set(result["comparison"]) == {
        "origin", "predicted_s", "measured_s", "error", "step_error", "slowdown", "error_beside_slowdown",
    }  # fmt: skip
    assert result["comparison"]["predicted_s"] == result["time"]["phase_s"]
    assert "measured / predicted" in plan("configs/quickstart.yaml", "--gpu", "cpu", "--against", record)


def test_a_run_to_fit_to_that_cannot_be_made() -> None:
    result = run_python(["-m", "benchmarks.runs.fit_planner", "run.stepz=3"])
    assert result.returncode == 2 and "run.stepz" in result.stderr


def test_measuring_this_machine() -> None:
    result = plan_json("configs/quickstart.yaml", "--gpu", "cpu", "--measure")
    values = {item["name"]: item["value"] for item in result["assumptions"]}
    assert 1e-6 < values["device: bf16 rate"] < 1e3, (
        "TFLOP/s; a busy processor without bfloat16 has a few thousandths of 1"
    )
    assert 0.1 < values["device: memory bandwidth"] < 1e4
    assert 1e-3 < values["float32 instead of bf16"] < 100, "measured too"
    here = fastest_dtype(this_cpu(instruction_limits())).dtype
    assert result["setup"]["student_dtype"] == result["setup"]["teacher_dtype"] == here, "what a run here would choose"


def test_the_teachers_turns_in_a_text_are_planned() -> None:
    """Of a teacher that reads a text again each time: a block of 8, of which a tenth is refused, brings 5.7 tokens."""
    path = REPOSITORY / "configs" / "methods" / "speculative.yaml"
    found = {
        share: plan_json(path, f"mixture={{student: {1 - share}, speculative: {share}}}", "--gpu", "cpu")
        for share in (0.0, 0.5, 1.0)
    }
    setups = {share: result["setup"] for share, result in found.items()}
    assert [setups[share]["student_share"] for share in found] == [1.0] * 3
    assert [setups[share]["together_share"] for share in found] == [0.0, 0.5, 1.0]
    a_turn = sum(0.9**place for place in range(8))
    assert setups[1.0]["teacher_turns"] == setups[0.5]["teacher_turns"] == pytest.approx(48 / a_turn)
    assert setups[1.0]["proposed_share"] == pytest.approx(8 / a_turn)
    seconds = {share: result["time"]["cause_s"]["sample"] for share, result in found.items()}
    assert "teacher's turns" not in seconds[0.0]
    assert seconds[1.0]["teacher's turns"] == pytest.approx(2 * seconds[0.5]["teacher's turns"], rel=0.1)
    assert seconds[1.0]["compute"] > seconds[0.0]["compute"], "what is thrown away was drawn, too"
    with pytest.raises(ConfigError, match=r"^--teacher: a served one cannot draw the texts of mixture\.speculative"):
        plan_command(path, gpu="cpu", teacher="served")


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan(PLANNED / "qwen3_8b_to_1.7b.yaml", "--gpus", "8", "--plot", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_config_json_of_ones_own(tmp_path: Path) -> None:
    shipped = REPOSITORY / "configs" / "models" / "Qwen3-0.6B.json"
    overrides = ("teacher.model=nobody/knows", "student.model=nobody/either")
    files = ("--student-config", shipped, "--teacher-config", shipped)
    result = plan_json(PLANNED / "qwen3_8b_to_1.7b.yaml", *overrides, *files, "--gpus", "8")
    assert result["student"]["parameters"] == result["teacher"]["parameters"] == 596_049_920
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(shipped.read_text())
    result = plan_json(PLANNED / "qwen3_8b_to_1.7b.yaml", f"student.model={folder}", "--gpus", "8")
    assert result["student"]["parameters"] == 596_049_920


def test_nodes() -> None:
    config = PLANNED / "qwen3_8b_to_1.7b.yaml"
    assert plan_json(config, "--nodes", "2")["setup"]["devices"] == 16
    assumptions = plan_json(config, "--nodes", "4", "--gpus", "16")["assumptions"]
    assert {"devices a node": 4}.items() <= {item["name"]: item["value"] for item in assumptions}.items()


def test_the_configs_placement_is_what_is_planned() -> None:
    served = ["teacher.placement=served", "teacher.addresses=[http://127.0.0.1:8300]", "--teacher-gpus", "1"]
    result = plan_json(PLANNED / "qwen3_8b_to_1.7b.yaml", *served)
    assert (result["setup"]["teacher_placement"], result["setup"]["teacher_devices"]) == ("served", 1)
    assert "teacher head" in json.dumps(result["memory"]) and "teacher weights" not in json.dumps(result["memory"])
    assert plan_json(PLANNED / "qwen3_8b_to_1.7b.yaml")["setup"]["teacher_placement"] == "local"


def test_a_served_sampler_is_planned_with_and_without_sampling_ahead() -> None:
    config = PLANNED / "qwen3_8b_to_1.7b.yaml"
    addresses = "rollout.addresses=[http://10.0.0.1:8400,http://10.0.0.2:8400]"
    served = ["--gpus", "8", "rollout.placement=served", addresses]
    result = plan_json(config, *served, "rollout.staleness=2")
    assert result["setup"]["sampler_replicas"] == 2 and result["setup"]["all_devices"] == 10
    steps = result["time"]["with_staleness"]
    assert list(steps) == ["0", "2"] and steps["2"]["step_s"] == result["time"]["step_s"] < steps["0"]["step_s"]
    text = plan(config, *served[:2], "--sampler-gpus", "8")
    assert "sampler  8 x h100 of its own, rollout.staleness=0" in text
    for staleness in (0, 1):
        assert f"step, rollout.staleness={staleness}" in text
    assert text.count("limited by sample: weights and cache") == 2
    assert list(plan_json(config, *served[:2])["time"]["with_staleness"]) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler-gpus", "0"], "--sampler-gpus: 0 must be at least 1"),
        (["--gpu", "tpu"], "--gpu: 'tpu' is not known; known: h100"),
        (["--gpus", "0"], "--gpus: 0 must be at least 1"),
        (["--gpus", "7"], "optim.batch_size: 512 is not a multiple"),
        (["--nodes", "3", "--gpus", "8"], "--gpus: 8 is not a multiple of --nodes 3"),
        (["--measure"], "--measure: measures this machine's CPU"),
        (["--prompt-tokens", "5000"], "--prompt-tokens: 5000 must be above 0 and at most 1024"),
        (["--completion-tokens", "-1"], "--completion-tokens: -1 must be above 0"),
        (["--teacher", "served", "--teacher-gpus", "0"], "--teacher-gpus: 0 must be at least 1"),
        (["--against", "nowhere.json"], "nowhere.json: "),
        (["--teacher-config", "nowhere.json"], "teacher.model: nowhere.json: "),
        (
            ["teacher.model=nobody/knows"],
            "teacher.model: no config.json of 'nobody/knows' on this machine; give one with",
        ),
        (["student.init.layers=99"], "student.init.layers: 99 of a model of 28 layers"),
        (["rollout.temprature=1"], "did you mean rollout.temperature?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run_gkd(["plan", PLANNED / "qwen3_8b_to_1.7b.yaml", *arguments])
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom gkd.cli.main import main\n"
        "sys.argv = ['gkd', 'plan', 'configs/planned/qwen3_32b_to_1.7b.yaml', '--gpus', '8', '--sweep']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'vllm', 'deepspeed', 'numpy'} & sys.modules.keys()"
    )
    check(run_python(["-c", code]))
