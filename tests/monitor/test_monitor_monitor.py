"""The monitor as the loop sees it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gkd.config import Config, make_config
from gkd.data import pack
from gkd.monitor import PHASES, Monitor, read_metrics
from gkd.types import Prompt, PromptDraw, Rollout

STATS = {"loss": 1.5, "divergence/forward_kl": 1.25, "tokens/scored": 100, "tokens/generated": 60}


def config(steps: int = 3, **log: bool) -> Config:
    return make_config(
        {
            "run": {"steps": steps},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"train": "d"},
            "log": log,
        }
    )


def monitor(folder: Path, steps: int = 3, file: io.StringIO | None = None, **options: Any) -> Monitor:
    log = options.pop("log", {})
    console = Console(file=file or io.StringIO(), width=80, force_terminal=options.pop("terminal", False))
    options = {"is_main": True, "decode": lambda ids: chr(ids[0]), **options}
    return Monitor(config(steps, **log), folder, console=console, **options)


def test_a_run_writes_one_record_and_one_line_a_step(tmp_path: Path) -> None:
    file = io.StringIO()
    with monitor(tmp_path, file=file) as run:
        for step in run.steps():
            for name in PHASES:
                with run.phase(name):
                    pass
            run.log(step, {**STATS, "mixture/student": 0.5})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == ["step 1/3", "step 2/3", "step 3/3"]
    for record in records:
        assert next(iter(record)) == "step"
        assert record["mixture/student"] == 0.5
        assert record["time/train_s"] == record["time/forward_backward_s"] + record["time/optimizer_s"]
        assert sum(record[f"time/{name}_s"] for name in (*PHASES, "other")) == pytest.approx(record["time/step_s"])
    assert run.time_totals["time/step_s"] == pytest.approx(sum(record["time/step_s"] for record in records))


def test_speeds_come_from_the_time_of_their_own_work(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        with run.phase("sample"):
            time.sleep(0.01)
        record = run.log(0, STATS)
        assert record["tokens/generated_per_s"] == pytest.approx(60 / float(record["time/sample_s"]))
        assert record["tokens/scored_per_s"] == pytest.approx(100 / float(record["time/step_s"]))
        assert run.log(1, STATS)["tokens/generated_per_s"] == 0
        assert "tokens/scored_per_s" not in run.log(2, {"loss": 1.0})


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        with pytest.raises(ValueError, match="step 0 have no loss"):
            run.log(0, {"lr": 1.0})
        with pytest.raises(ValueError, match="'speed' is not described"):
            run.log(0, {**STATS, "speed": 1.0})
        with pytest.raises(ValueError, match="'time/sample_s' is logged twice"):
            run.log(0, {**STATS, "time/sample_s": 1.0})
        with pytest.raises(ValueError, match="'step' is logged twice in one step: 0 and 5"):
            run.log(0, {**STATS, "step": 5})
        with pytest.raises(ValueError, match="twice"):
            run.log(0, STATS, {"loss": 9.0})
        run.log(0, STATS)
        with pytest.raises(ValueError, match="step 0 is logged after step 0"):
            run.log(0, STATS)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_resume_takes_up_where_the_checkpoint_was(tmp_path: Path) -> None:
    with monitor(tmp_path) as run:
        for step in run.steps():
            run.log(step, STATS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with monitor(tmp_path, start_step=1) as run:
        seen = [run.log(step, {"loss": 9.0})["step"] for step in run.steps()]
    assert seen == [1, 2]
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 1.5), (1, 9.0), (2, 9.0)]


def test_an_exception_in_the_loop_gives_the_terminal_back(tmp_path: Path) -> None:
    file = io.StringIO()
    run = monitor(tmp_path, file=file, terminal=True)
    with pytest.raises(KeyError):
        for _ in run.steps():
            with run.phase("sample"):
                raise KeyError
    assert file.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
    run.close()
    run.close()


def test_other_ranks_only_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(tmp_path / "run", is_main=False) as run:
        for step in run.steps():
            run.note("x")
            run.first_batch([], [])
            assert set(run.log(step, {})) == set(run.time_totals)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_batch_is_shown_once_and_kept(tmp_path: Path, terminal: bool) -> None:
    file = io.StringIO()
    rollouts = [Rollout(PromptDraw(Prompt(4, (65, 66), "AB"), 0), "dataset", (67, 68))]
    batches = pack(rollouts, None, micro_batch_size=2, pad_token_id=0, reduction="token_mean")
    with monitor(tmp_path, file=file, terminal=terminal) as run:
        for _ in range(2):
            run.first_batch(rollouts, batches)
    assert file.getvalue().count("prompt 4 sample 0 (dataset)") == 1
    assert ("AB[C][D]" in file.getvalue()) is not terminal
    assert (tmp_path / "samples" / "first_batch.txt").read_text().endswith("AB[C][D]\n")


def test_the_first_batch_shows_what_is_really_scored(tmp_path: Path) -> None:
    """A mask that is off by one is seen, because the view is drawn from the packed tensors."""
    rollouts = [Rollout(PromptDraw(Prompt(4, (65, 66), "AB"), 0), "dataset", (67, 68))]
    (batch,) = pack(rollouts, None, micro_batch_size=2, pad_token_id=0, reduction="token_mean")
    with monitor(tmp_path) as run:
        run.first_batch(rollouts, [replace(batch, score_index=batch.score_index - 1)])
    assert (tmp_path / "samples" / "first_batch.txt").read_text().endswith("A[B][C]D\n")


def test_the_first_batch_can_be_switched_off(tmp_path: Path) -> None:
    with monitor(tmp_path, log={"show_first_batch": False}) as run:
        run.first_batch([], [])
    assert not (tmp_path / "samples").exists()


def test_a_missing_service_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    file = io.StringIO()
    with monitor(tmp_path, file=file, log={"wandb": True, "tensorboard": True}) as run:
        for step in run.steps():
            run.log(step, STATS)
    lines = file.getvalue().splitlines()
    assert [line.split(" is off")[0] for line in lines[:2]] == ["warning: TensorBoard", "warning: W&B"]
    assert [line.split()[0] for line in lines[2:]] == ["step"] * 3
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_the_room_does_not_import_torch() -> None:
    code = "import sys, json, gkd.monitor; print(json.dumps('torch' in sys.modules or 'wandb' in sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(answer.stdout) is False
