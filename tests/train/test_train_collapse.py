"""A student that comes apart is warned of, and may end its run; one that only learns is left alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import save_prompts

from gkd.config import CollapseConfig, Config, Launch, make_config
from gkd.errors import CheckpointError, CollapseError
from gkd.planning.settled import settle_here
from gkd.run_files import RunFiles
from gkd.train import distributed
from gkd.train.checkpoint import saved_steps
from gkd.train.collapse import CollapseWatch
from gkd.train.parts import room_of_texts
from gkd.train.placements import ask_placements
from gkd.train.run import Run

LIMITS = CollapseConfig(steps=8, first_steps=3)  # warned of after two steps
HEALTHY = {"samples/mean_tokens": 20.0, "samples/truncated_share": 0.1, "samples/repeated_share": 0.05}
LOOPING = {"samples/mean_tokens": 60.0, "samples/truncated_share": 0.9, "samples/repeated_share": 0.8}


def judged(watch: CollapseWatch, steps: Iterable[Mapping[str, float]], start: int = 0) -> dict[int, str]:
    """What each step was judged to be, where there was something to say."""
    found: dict[int, str] = {}
    for step, metrics in enumerate(steps, start + 1):
        first, *rest = metrics.items()  # a step is logged in parts
        watch.observe(dict([first]))
        watch.observe(dict(rest))
        if (reason := watch.judge(step)) is not None:
            found[step] = reason
    return found


def test_texts_that_grow_until_they_are_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gkd"):
        found = judged(CollapseWatch(LIMITS, is_main=True), [HEALTHY] * 3 + [LOOPING] * 9)
    assert list(found) == [11, 12]
    assert found[11].startswith(
        "the student's samples have 60 tokens on average, 3.0 times those of the first 3 steps, and 90% of the "
        "student's samples were cut off before an end token, 10% in the first 3 steps, for 8 steps; "
    )
    assert len(caplog.messages) == 3 and all(said.startswith("step 5: ") for said in caplog.messages)  # each once
    cut_off, long, repeats = caplog.messages
    assert "90% of the student's samples were cut off" in cut_off and "raise rollout.max_new_tokens" in cut_off
    assert "3.0 times" in long and "mixture.teacher" in long
    assert "80% of the 4-grams" in repeats


@pytest.mark.parametrize(
    "change",
    [
        {"samples/mean_tokens": 39.0},  # cut off, and not twice as long
        {"samples/truncated_share": 0.49},  # three times as long, as the task asks
    ],
)
def test_one_half_alone_is_no_collapse(change: dict[str, float]) -> None:
    assert judged(CollapseWatch(LIMITS, is_main=True), [HEALTHY] * 3 + [LOOPING | change] * 20) == {}


def test_texts_that_a_schedule_lets_grow_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    """Always cut off, and four times as long as at first, as rollout.max_new_tokens is."""
    steps = [LOOPING | {"samples/repeated_share": 0.0, "samples/mean_tokens": 16.0 * (1 + n // 3)} for n in range(20)]
    with caplog.at_level(logging.WARNING, "gkd"):
        watch = CollapseWatch(LIMITS, is_main=True, room=lambda step: 16.0 * (1 + step // 3))
        assert judged(watch, steps) == {} and caplog.messages == []
        watch = CollapseWatch(LIMITS, is_main=True, room=lambda step: 16.0 if step < 3 else 32.0)
        (first, *_) = judged(watch, steps).values()
    assert first.startswith(
        "the student's samples have 112 tokens on average, 3.5 times those of the first 3 steps for "
    )


def test_room_is_of_all_turns() -> None:
    sections = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    rollout = {"max_new_tokens": {"from": 8, "to": 16, "steps": 2}}
    config = make_config({**sections, "rollout": rollout})
    assert [room_of_texts(config, step) for step in range(4)] == [8.0, 12.0, 16.0, 16.0]
    turns = {"kind": "calculator", "max_turns": {"from": 2, "to": 4, "steps": 2}}
    config = make_config({**sections, "rollout": rollout, "environment": turns})
    assert [room_of_texts(config, step) for step in range(4)] == [16.0, 36.0, 64.0, 64.0]


def test_texts_that_were_always_cut_off_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    short = {"samples/mean_tokens": 48.0, "samples/truncated_share": 0.9, "samples/repeated_share": 0.1}
    with caplog.at_level(logging.WARNING, "gkd"):
        assert judged(CollapseWatch(LIMITS, is_main=True), [short] * 20) == {}
    assert not caplog.messages


def test_a_step_in_between_begins_the_count_anew() -> None:
    steps = [HEALTHY] * 3 + [LOOPING] * 7 + [HEALTHY] + [LOOPING] * 7
    assert judged(CollapseWatch(LIMITS, is_main=True), steps) == {}


def test_a_step_that_samples_nothing_says_nothing() -> None:
    nothing = {"loss": 1.0, "entropy/student": 2.0}
    steps = [HEALTHY, nothing, HEALTHY, HEALTHY] + [LOOPING, nothing] * 8
    assert list(judged(CollapseWatch(LIMITS, is_main=True), steps)) == [19]  # the eighth that samples


def entropies(student: float, teacher: float | None) -> dict[str, float]:
    return {"loss": 1.0, "entropy/student": student} | ({} if teacher is None else {"entropy/teacher": teacher})


@pytest.mark.parametrize(("teacher", "is_collapse"), [(1.0, True), (None, True), (0.3, False), (math.nan, True)])
def test_an_entropy_that_is_gone(teacher: float | None, is_collapse: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Beside a teacher that is as sure of itself the student has only learned."""
    steps = [entropies(3.0, teacher)] * 3 + [entropies(0.2, teacher)] * 8
    with caplog.at_level(logging.WARNING, "gkd"):
        found = judged(CollapseWatch(LIMITS, is_main=True), steps)
    assert list(found) == ([11] if is_collapse else [])
    assert len(caplog.messages) == int(is_collapse)
    if is_collapse:
        assert "the student's entropy is 0.2 nats, 7% of that of the first 3 steps" in found[11]
        assert ("and its teacher's 1" in found[11]) == (teacher == 1.0)


def test_what_is_remembered_is_in_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(LIMITS, is_main=True)
    judged(watch, [HEALTHY] * 3 + [LOOPING] * 5)
    watch.save_state(str(tmp_path))
    resumed = CollapseWatch(LIMITS, is_main=True)
    resumed.load_state(str(tmp_path))
    caplog.clear()
    assert list(judged(resumed, [LOOPING] * 3, start=8)) == [11]
    assert not caplog.messages  # said before
    with pytest.raises(CheckpointError, match=r"collapse\.json"):
        resumed.load_state(str(tmp_path / "empty"))


def growing(tmp_path: Path, teacher: Path, student: Path) -> Config:
    """Texts whose limit rises from 2 to 12 tokens, and which hardly end before it."""
    asked = make_config(
        {
            "run": {
                "dir": str(tmp_path / "run"),
                "steps": 12,
                "save_every": 5,
                "stop_on": "collapse",
                "collapse": {"steps": 2, "first_steps": 1, "length_ratio": 2.0},
            },
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "student": {"model": str(student), "dtype": "float32"},
            "data": {"train": str(save_prompts(tmp_path / "train.jsonl", 8)), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": {"from": 2, "to": 12, "steps": 10}},
            "optim": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
        }
    )
    return settle_here(asked, 0, 1).config


def run(config: Config, folder: Path, *, resume: bool = False) -> RunFiles:
    files = RunFiles(folder)
    files.path.mkdir(exist_ok=True)
    distributed.initialize(Launch())
    with closing(ask_placements(config)) as placements:
        Run(config, Launch(), files, placements, resume=resume).train(0.0)
    return files


@pytest.mark.slow
def test_a_run_stops_saved_and_goes_on_if_told_to(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gkd.train.parts.room_of_texts", lambda config, step: 1.0)  # as if they grew by themselves
    config = growing(tmp_path, tiny_teacher, tiny_student)
    with pytest.raises(CollapseError, match=r"^run\.stop_on: after step \d+ .*--resume run\.stop_on=null$") as stopped:
        run(config, tmp_path / "run")
    steps = saved_steps(RunFiles(tmp_path / "run").checkpoints)
    assert f"after step {steps[-1]} " in str(stopped.value) and 3 < steps[-1] < 12
    on = config.model_copy(update={"run": config.run.model_copy(update={"stop_on": None})})
    resumed, whole = run(on, tmp_path / "run", resume=True), run(on, tmp_path / "whole")
    expected = load_file(whole.final / "model.safetensors")
    for name, tensor in load_file(resumed.final / "model.safetensors").items():
        assert tensor.equal(expected[name]), name
