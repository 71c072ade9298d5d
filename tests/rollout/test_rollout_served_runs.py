"""Whole runs with a sampler in its own process: the same losses on two ranks, and what sampling ahead changes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import check, environment, read_metrics, run_gkd, torchrun
from teacher_servers import TeacherServer, start_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 5


class Servers:
    """A teacher, and a sampler that completes one prompt after another: sums do not depend on what else runs."""

    def __init__(self, folder: Path, teacher: Path, student: Path) -> None:
        self.folder, self.teacher_model, self.student_model = folder, teacher, student
        self.teacher = start_server(teacher, folder, "--dtype", "float32", "--max-model-tokens", "200")
        self.sampler = self.start_sampler()

    def start_sampler(self) -> TeacherServer:
        options = ("--dtype", "float32", "--max-model-tokens", "256", "--max-num-seqs", "1", "--kv-cache-gib", "0.1")
        return start_server(self.student_model, self.folder, *options, command="serve-sampler")

    def config(self, folder: Path, name: str, sampler: TeacherServer, **sections: dict[str, Any]) -> Path:
        rows = [
            {"prompt": f"prompt {i} " + "x" * i, "completion": "y" * (1 + i), "task": {"rooms": 3, "seed": i}}
            for i in range(16)
        ]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        token = str(self.folder / "token")
        values: dict[str, dict[str, Any]] = {
            "run": {"name": name, "dir": str(folder / name), "steps": STEPS, "seed": 5},
            "teacher": {"model": str(self.teacher_model), "dtype": "float32", "placement": "served",
                        "addresses": [self.teacher.address], "token_file": token},
            "student": {"model": str(self.student_model), "dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
            "rollout": {"placement": "served", "addresses": [sampler.address], "token_file": token,
                        "max_concurrency": 1, "max_new_tokens": 12},
            "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 4},
        }  # fmt: skip
        for section, keys in sections.items():
            values.setdefault(section, {}).update(keys)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("served-runs"), tiny_teacher, tiny_student)
    try:
        for server in (started.teacher, started.sampler):
            server.wait_until_ready(240)
        yield started
    finally:
        for server in (started.teacher, started.sampler):
            server.process.kill()


@pytest.mark.parametrize("staleness", [0, 1])
def test_conversations_by_served_parts(staleness: int, servers: Servers, tmp_path: Path) -> None:
    """Of raw text: observations follow as they are."""
    sections: dict[str, Any] = {
        "rollout": {"max_new_tokens": 100, "staleness": staleness},
        "environment": {"kind": "text_game", "max_turns": 3, "turn_tokens": 5, "max_observation_tokens": 20},
    }
    check(run_gkd(["train", servers.config(tmp_path, "talks", servers.sampler, **sections)]))
    records = read_metrics(tmp_path / "talks")
    assert all(record["environment/turns"] > 2.5 and record["environment/observed_tokens"] > 30 for record in records)
    assert all(record["tokens/scored"] == record["tokens/generated"] <= 8 * 15 for record in records)
    assert records[0]["mismatch/k3"] < 1e-8, "what was appended is what the trainer reads"
    assert [record.get("rollout/staleness", 0) for record in records] == [0, *[staleness] * (STEPS - 1)]


@pytest.mark.long
def test_two_ranks_with_everything_served_have_the_losses_of_one_process(servers: Servers, tmp_path: Path) -> None:
    check(run_gkd(["train", servers.config(tmp_path, "one", servers.sampler)]))
    two = servers.config(tmp_path, "two", servers.sampler)
    check(torchrun(2, ["-m", "gkd", "train", two, "deepspeed.zero_stage=3"]))
    ours, theirs = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(ours) == len(theirs) == STEPS and abs(ours[0]["loss"] - ours[-1]["loss"]) > 1e-3
    for here, there in zip(ours, theirs, strict=True):
        assert there["tokens/generated"] == here["tokens/generated"]
        assert there["loss"] == pytest.approx(here["loss"], abs=1e-4)
        assert there["sync/max_logprob_error"] < 1e-4 and there["mismatch/k3"] < 1e-8


def test_one_step_ahead_on_two_ranks_with_zero_3(servers: Servers, tmp_path: Path) -> None:
    ahead = servers.config(tmp_path, "ahead", servers.sampler, rollout={"staleness": 1}, optim={"lr": 5e-3})
    check(torchrun(2, ["-m", "gkd", "train", ahead, "deepspeed.zero_stage=3"]))
    first, *later = read_metrics(tmp_path / "ahead")
    assert first["rollout/staleness"] == 0 and first["mismatch/k3"] < 1e-8
    assert len(later) == STEPS - 1
    for step, record in enumerate(later, start=1):
        assert record["rollout/staleness"] == 1 and record["weights_version"] == step - 1
        assert record["mismatch/k3"] > 1e-6, "the student has moved on since it sampled"


def start_run(config: Path, metrics: Path) -> subprocess.Popen[str]:
    """A run that has done two steps at least."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gkd", "train", str(config)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.long
def test_a_run_that_samples_ahead_stops_on_a_signal_and_begins_anew(servers: Servers, tmp_path: Path) -> None:
    config = servers.config(tmp_path, "stopped", servers.sampler, run={"steps": 500}, rollout={"staleness": 1})
    process = start_run(config, tmp_path / "stopped" / "metrics.jsonl")
    process.send_signal(signal.SIGUSR1)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75, stderr[-3000:]
    steps = len(read_metrics(tmp_path / "stopped"))
    check(run_gkd(["train", config, f"run.steps={steps + 2}", "--resume"]))
    resumed = read_metrics(tmp_path / "stopped")[steps:]
    assert [r["rollout/staleness"] for r in resumed] == [0, 1] and resumed[0]["weights_version"] == steps


@pytest.mark.fault
@pytest.mark.long
def test_a_sampler_that_dies_in_the_middle_costs_no_step(servers: Servers, tmp_path: Path) -> None:
    doomed = servers.start_sampler().wait_until_ready(240)
    sections = {"run": {"steps": 500}, "rollout": {"staleness": 1, "retry_s": 3}}
    config = servers.config(tmp_path, "dying", doomed, **sections)
    process = start_run(config, tmp_path / "dying" / "metrics.jsonl")
    doomed.process.kill()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in stderr, stderr[-3000:]
    assert doomed.address in stderr and "saved in" in stderr and "--resume" in stderr
