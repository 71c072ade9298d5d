"""The comparison with TRL runs from end to end on tiny models, goes on where it was cut off, and becomes a table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import run_python
from tiny import save_tiny_model

from benchmarks.runs.planned import training_flops
from benchmarks.runs.versus_trl import launch
from benchmarks.runs.versus_trl.engine import gkd_config
from benchmarks.runs.versus_trl.job import Job, Stopwatch, Work, check_same_work
from benchmarks.runs.versus_trl.profiled import group
from gkd.planning.models import architectures

CONTENDERS = ["gkd", "TRL DistillationTrainer", "TRL GKDTrainer"]
PARTS = ("sampling_s", "scoring_s", "training_s", "sync_s", "other_s")


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", f"benchmarks.{name}", *map(str, arguments)], timeout_s=500)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two of tiny steps by every contender, in one round."""
    folder = tmp_path_factory.mktemp("versus_trl")
    arguments = ["--smoke", "--rounds", 1, "--folder", folder / "work", "--out", folder / "results" / "versus_trl.json"]
    done = run_benchmark("runs.versus_trl", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    path = folder / "results" / "versus_trl.json"
    return SimpleNamespace(arguments=arguments, path=path, record=json.loads(path.read_text()), said=done.stdout)


def work_in(folder: Path, **changes: Any) -> Work:
    return Work(teacher="teacher", layers=2, train="train", heldout="heldout", folder=str(folder), **changes)


# ---- the whole


@pytest.mark.slow
@pytest.mark.long
def test_every_contender_did_the_work_and_its_parts_add_up(smoke: SimpleNamespace) -> None:
    record = smoke.record
    assert list(record["contenders"]) == CONTENDERS
    for contender in record["contenders"].values():
        (found,) = contender["rounds"]
        assert len(found["steps"]) == record["work"]["steps"] == 2
        for step in found["steps"]:
            assert sum(step[part] for part in PARTS) == pytest.approx(step["step_s"], rel=0.02)
            assert min(step[part] for part in PARTS[:3]) > 0
            assert 4 <= step["tokens"] <= 4 * 4  # sequences, and their longest completions
        counted = found["steps"][1]
        assert found["step_s"] == counted["step_s"] and found["tokens"] == counted["tokens"]
        assert found["peak_rss_bytes"] > 200 << 20  # torch alone is that large
        assert found["heldout"]["heldout/jsd"] != record["heldout_before"]["heldout/jsd"]
    assert record["contenders"]["gkd"]["over_rounds"]["sync_s"]["median"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_the_ratio_is_of_the_faster_trainer(smoke: SimpleNamespace) -> None:
    step_s = {name: found["over_rounds"]["step_s"]["median"] for name, found in smoke.record["contenders"].items()}
    fastest = min(CONTENDERS[1:], key=lambda name: step_s[name])
    assert smoke.record["fastest_trl"] == fastest
    assert smoke.record["speedup_vs_fastest_trl"] == pytest.approx(step_s[fastest] / step_s["gkd"])
    assert f"{step_s[fastest] / step_s['gkd']:.2f} times as fast" in smoke.said


@pytest.mark.slow
@pytest.mark.long
def test_for_the_same_seconds_each_trains_as_many_steps_as_they_hold(smoke: SimpleNamespace) -> None:
    found = smoke.record["same_seconds"]
    step_s = {name: one["over_rounds"]["step_s"]["median"] for name, one in smoke.record["contenders"].items()}
    assert found["seconds"] == pytest.approx(3 * step_s["gkd"]) and found["contenders"]["gkd"]["steps"] == 3
    before = smoke.record["heldout_before"]["heldout/jsd"]
    for name, contender in found["contenders"].items():
        assert contender["steps"] == max(1, int(found["seconds"] / step_s[name] + 1e-9))
        (heldout,) = contender["heldout"]
        assert heldout["heldout/jsd"] != before
    assert f"after {found['seconds']:.0f} s of training" in smoke.said


@pytest.mark.slow
@pytest.mark.long
def test_the_profile_covers_the_step(smoke: SimpleNamespace) -> None:
    profile = smoke.record["profile"]
    phases = profile["phases"]
    assert {"sample", "score", "forward_backward", "optimizer", "sync"} <= set(phases)
    assert 0.5 < sum(sum(groups.values()) for groups in phases.values()) / profile["step_s"] < 1.2
    assert phases["forward_backward"]["matrix products"] > 0 and phases["optimizer"]["optimizer"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_started_again_it_measures_nothing_twice(smoke: SimpleNamespace) -> None:
    done = run_benchmark("runs.versus_trl", *smoke.arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured before") == 12 and " s, " not in done.stdout
    assert json.loads(smoke.path.read_text())["contenders"] == smoke.record["contenders"]


@pytest.mark.slow
@pytest.mark.long
def test_tables_show_what_the_record_says(smoke: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    sections = [f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in ("versus_trl", "versus_trl-profile")]
    page.write_text("".join(sections))
    assert run_benchmark("figures.tables", "--results", smoke.path.parent, "--write", page).returncode == 0
    text = page.read_text()
    for name in CONTENDERS:
        jsd = smoke.record["contenders"][name]["over_rounds"]["heldout/jsd"]["median"]
        assert any(line.startswith(f"| {name} |") and f"| {jsd:.4f} (" in line for line in text.splitlines())
    assert "| matrix products |" in text and "jsd(0.5)" in text
    assert run_benchmark("figures.tables", "--results", smoke.path.parent, "--check", page).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--batch", 12], "--batch: 12"), (["--steps", 1], "--steps"), (["--kind", "tvd"], "tvd")]
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[object], said: str) -> None:
    done = run_benchmark("runs.versus_trl", *arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# ---- its parts


def test_other_prompts_another_order_or_other_stop_tokens_are_an_error(tmp_path: Path) -> None:
    check, work = check_same_work, work_in(tmp_path, steps=1, batch_size=2)
    prompts = [[1, 2], [3], [4]]
    prepared = {"prompts": [{"ids": ids} for ids in prompts], "stop_token_ids": [7]}
    check(prompts[:2], 7, work, prepared)
    check(prompts[:2], [7], work, prepared)
    for wrong in ([[1, 2]], [[3], [1, 2]], [[1, 2], [5]], prompts):
        with pytest.raises(RuntimeError, match="prompts"):
            check(wrong, 7, work, prepared)
    with pytest.raises(RuntimeError, match=r"\[2, 7\]"):
        check(prompts[:2], [7, 2], work, prepared)


def test_a_stopwatch_gives_the_rest_to_training() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("sampling"):
            time.sleep(0.02)
        time.sleep(0.03)
        watch.add_tokens(5)
        watch.finish_step()
    for step in watch.steps:
        assert step["tokens"] == 5 and 0.02 <= step["sampling_s"] < step["step_s"]
        assert step["training_s"] == pytest.approx(step["step_s"] - step["sampling_s"]) and step["training_s"] >= 0.03


def test_a_failed_job_leaves_its_reason_and_no_result(tmp_path: Path) -> None:
    job = Job("missing", work_in(tmp_path), {}, str(tmp_path / "result.json"))
    with pytest.raises(launch.JobError, match=r"No module named 'benchmarks.runs.versus_trl.missing'"):
        launch.launched(job)
    assert not Path(job.result).exists()
    assert Job.read(tmp_path / "result.job.json").work == job.work


def test_what_a_process_left_when_its_watcher_was_killed_is_no_result(tmp_path: Path) -> None:
    job = Job("machine", work_in(tmp_path), {"seconds_a_size": 0.01}, str(tmp_path / "result.json"))
    (tmp_path / "result.own.json").write_text('{"flops_per_s": 1}')
    found = launch.launched(job)
    assert found["flops_per_s"] > 1e6 and found["peak_rss_bytes"] > 100 << 20 and found["wall_s"] > 0
    assert launch.launched(job) == found
    assert launch.is_done(job)
    assert not launch.is_done(replace(job, options={"seconds_a_size": 0.02}))


ALLOCATES_IN_A_CHILD = """
import subprocess, sys
child = "import time; block = bytearray(b'x') * (300 << 20); time.sleep(1)"
subprocess.run([sys.executable, "-c", child])
"""


def test_peak_memory_is_that_of_the_process_tree() -> None:
    process = subprocess.Popen([sys.executable, "-c", ALLOCATES_IN_A_CHILD])
    peak_bytes = launch.watched(process)
    assert process.returncode == 0
    assert 300 << 20 < peak_bytes < 400 << 20


def test_flops_are_what_torch_counts(tmp_path: Path) -> None:
    """One padding-free batch through plain PyTorch: layers, both heads, the loss's gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    from gkd.models import load_causal_lm

    prompt, new, batch = 40, 24, 2
    teacher = save_tiny_model(tmp_path / "teacher", layers=4, hidden=128)
    work = replace(work_in(tmp_path, batch_size=batch, micro_batch_size=batch), teacher=str(teacher))
    save_tiny_model(work.student, layers=2)
    student: Any = load_causal_lm(str(work.student), torch.float32, key="student.model")
    ids = torch.zeros(batch, prompt + new, dtype=torch.int64)
    teacher_logits = torch.zeros(batch * new, 259)
    with FlopCounterMode(display=False) as counter:
        states = student.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        logits = student.lm_head(states).flatten(0, 1)
        _ = torch.randn(batch * new, 128) @ torch.randn(128, 259)  # the teacher's logits
        (logits.softmax(-1) - teacher_logits).square().sum().backward()
    models = architectures(gkd_config(work, tmp_path / "run", 0))
    # torch counts no attention on a CPU: two products, half of each masked, and twice that backward; 2 layers, width 64
    attention = 3 * 2 * 2 * 2 * 64 * (prompt + new) / 2 * batch * (prompt + new)
    assert training_flops(*models, batch, prompt, new) == counter.get_total_flops() + attention


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies and casts"),
        ("aten::mul", "other operators"),
    ],
)
def test_operators_are_grouped_by_kind(operator: str, kind: str) -> None:
    assert group(operator) == kind
