"""Stopping early on a signal, and knowing afterwards which rank was where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import MakeConfig, check, environment, read_metrics, run_gkd, torchrun


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while len(read_metrics(run) if (run / "metrics.jsonl").exists() else []) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_saves_and_a_resume_ends_as_if_nothing_had_happened(
    finished_run: Callable[..., Path], make_run_config: MakeConfig, tmp_path: Path
) -> None:
    whole = finished_run(run={"steps": 12})
    stopped = make_run_config("stopped", run={"steps": 12})
    process = subprocess.Popen(
        [sys.executable, "-m", "gkd", "train", str(stopped)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(tmp_path / "stopped", 2, process)
    os.kill(process.pid, signal.SIGTERM)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 75, stderr
    steps = len(read_metrics(tmp_path / "stopped"))
    assert 2 <= steps < 12
    assert f"stopped after step {steps}, saved in" in stderr and "--resume" in stderr
    log = (tmp_path / "stopped" / "logs" / "rank_0.log").read_text()
    assert "SIGTERM: the run stops after this step" in log and f"step {steps - 1}: sample" in log

    resumed = check(run_gkd(["train", stopped, "--resume"]))
    assert f"resumed at step {steps}" in resumed.stdout
    losses = [[r["loss"] for r in read_metrics(run)] for run in (whole, tmp_path / "stopped")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_launcher_hands_the_signal_on_and_the_exit_code_back(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """torchrun itself ends on SIGUSR1 and leaves its ranks, and turns 75 into 1."""
    run = tmp_path / "launched"
    config = make_run_config("launched", run={"steps": 500}, deepspeed={"zero_stage": 2})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train = [*torchrun, "-m", "gkd", "train", config, "optim.micro_batch_size=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gkd", "launch", "--", *train],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_steps(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 75, stderr[-3000:]
    steps = len(read_metrics(run))
    assert (run / "checkpoints" / f"step_{steps}" / "manifest.json").exists()
    assert json.loads((run / "exit.json").read_text())["status"] == 75


@pytest.mark.slow
@pytest.mark.fault
def test_a_failing_rank_says_who_and_where(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config("failing", deepspeed={"zero_stage": 2})
    script = tmp_path / "failing.py"
    script.write_text(  # it scores held-out texts, answers, step 0, step 1
        "import gkd.teacher.local as local\n"
        "from gkd.cli.main import main\n"
        "from gkd.config import Launch\n"
        "from gkd.errors import TeacherError\n"
        "whole, calls = local.LocalTeacher.score, []\n"
        "def score(self, rollouts):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4 and Launch.from_environment().rank == 1:\n"
        "        raise TeacherError('the planted fault')\n"
        "    return whole(self, rollouts)\n"
        "local.LocalTeacher.score = score\n"
        "main()\n"
    )
    start = time.monotonic()
    result = torchrun(2, [script, "train", config, "optim.micro_batch_size=2"])
    assert result.returncode != 0 and time.monotonic() - start < 120
    assert "TeacherError: the planted fault (rank 1, step 1, phase score)" in result.stderr
    logs = tmp_path / "failing" / "logs"
    assert "the planted fault" in (logs / "rank_1.log").read_text()
    other = (logs / "rank_0.log").read_text()
    assert "step 1: score" in other and "step 2" not in other


@pytest.mark.long
@pytest.mark.fault
def test_a_rank_that_is_stopped_in_a_save_ends_the_other(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """It would be waited for in a collective; the launcher sees nothing but processes that run."""
    config = make_run_config("stopped", run={"silent_rank_s": 4})
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal\n"
        "from gkd.cli.main import main\n"
        "from gkd.train.checkpoint import Checkpointer\n"
        "save = Checkpointer.save\n"
        "def stopped(checkpoints, steps_done):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return save(checkpoints, steps_done)\n"
        "Checkpointer.save = stopped\n"
        "main()\n"
    )
    start = time.monotonic()
    result = torchrun(2, [script, "train", config, "optim.micro_batch_size=2", "run.save_every=1"])
    assert result.returncode != 0 and time.monotonic() - start < 120  # half a minute of which is the launcher's
    assert "rank 1 has not been heard of for 4 s; this rank ends" in result.stderr, result.stderr
    assert json.loads((tmp_path / "stopped" / "exit.json").read_text())["status"] == 1


@pytest.mark.slow
@pytest.mark.fault
def test_a_teacher_that_is_away_for_one_rank_stops_both_with_their_work_saved(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config("away", deepspeed={"zero_stage": 2})
    script = tmp_path / "away.py"
    script.write_text(  # it scores held-out texts, answers, step 0, step 1
        "from gkd.cli.main import main\n"
        "from gkd.config import Config\n"
        "from gkd.errors import TeacherError\n"
        "from gkd.train.parts.together import SharedTeacher\n"
        "from gkd.train.run import Run\n"
        "class Away:\n"
        "    def __init__(self, teacher, rank):\n"
        "        self.teacher, self.rank, self.calls = teacher, rank, 0\n"
        "    def score(self, rollouts):\n"
        "        self.calls += 1\n"
        "        if self.calls == 4 and self.rank == 1:\n"
        "            raise TeacherError('nobody answers', is_temporary=True)\n"
        "        return self.teacher.score(rollouts)\n"
        "build = Run.build_teacher\n"
        "Run.build_teacher = lambda run: SharedTeacher(Away(build(run), run.launch.rank))\n"
        "Config.has_servers = property(lambda config: True)\n"
        "main()\n"
    )
    result = torchrun(2, [script, "train", config, "optim.micro_batch_size=2"], timeout_s=240)
    assert result.returncode != 0
    assert f"(rank 1: nobody answers), saved in {tmp_path}/away/checkpoints/step_1; go on under the" in result.stderr
    check(torchrun(2, [*("-m", "gkd", "train"), config, "optim.micro_batch_size=2", "--resume"], timeout_s=240))
    assert [record["step"] for record in read_metrics(tmp_path / "away")] == [0, 1, 2]
