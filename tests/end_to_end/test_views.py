"""Runs whose teacher reads more than the student: whoever wrote a text, the student's side stays what it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bare_runs import Bare, ran, with_views, without_times
from launching import MakeConfig, check, run_gkd

from gkd.config import load_config
from gkd.types import Rollout, TokenBatch

TOLD = "The answer is y."


def told(folder: Path, out: Path, content: Callable[[str], str]) -> dict[str, str]:
    """As the config's data names it."""
    with_views(folder, out, content)
    return {name: str(out / f"{name}.jsonl") for name in ("train", "heldout")}


class Watched(Bare):
    """Keeps what the first step was made of."""

    def build_monitor(self) -> Any:
        monitor = super().build_monitor()
        monitor.first_batch = self._keep
        self.kept: list[tuple[Sequence[Rollout], Sequence[TokenBatch]]] = []
        kept.append(self)
        return monitor

    def _keep(self, rollouts: Sequence[Rollout], batches: Sequence[TokenBatch]) -> None:
        self.kept.append((rollouts, batches))


kept: list[Watched] = []


def watched(path: Path) -> tuple[list[dict[str, float]], Any, Watched]:
    logged, weights = ran(Watched, load_config(path, ["eval={prompts: 2, samples: 1, every: 1}", "run.steps=2"]))
    return logged, weights, kept[-1]


@pytest.mark.usefixtures("sampling_here")
@pytest.mark.parametrize("optim", [{}, {"micro_batch_tokens": 120}])
def test_the_students_own_view_is_the_ordinary_run_bitwise_and_another_is_not(
    make_run_config: MakeConfig, tmp_path: Path, data_folder: Path, optim: dict[str, int]
) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "more").mkdir()
    same = told(data_folder, tmp_path / "same", lambda text: text)
    more = told(data_folder, tmp_path / "more", lambda text: f"{text} {TOLD}")
    plain, weights, before = watched(make_run_config("plain", optim=optim))
    of_same, same_weights, _ = watched(make_run_config("same_run", data=same, optim=optim))
    of_more, _, after = watched(
        make_run_config("more_run", data=more, optim=optim, teacher={"max_prompt_tokens": 100, "cache_gib": 0.1})
    )
    assert without_times(of_same) == without_times(plain)
    assert all((weights[name] == same_weights[name]).all() for name in weights)
    assert of_more[0]["loss"] != plain[0]["loss"] and of_more[0]["heldout/jsd"] != plain[0]["heldout/jsd"]

    def first(run: Watched, source: str) -> list[tuple[int, ...]]:
        return [rollout.token_ids for rollout in run.kept[0][0] if rollout.source == source]

    for source in ("student", "dataset"):
        assert first(after, source) == first(before, source) != [], "the student reads its own prompt"
    written = zip(first(after, "teacher"), first(before, "teacher"), strict=True)
    assert all(ours != theirs for ours, theirs in written), "the teacher writes from its own view"
    for rollout in after.kept[0][0]:
        prompt = rollout.draw.prompt
        assert prompt.teacher_ids is not None and len(prompt.teacher_ids) > len(prompt.token_ids)
        assert rollout.token_ids[: len(prompt.token_ids)] == prompt.token_ids


def test_too_long_a_view_is_known_before_a_model_is_loaded(
    make_run_config: MakeConfig, tmp_path: Path, data_folder: Path
) -> None:
    rows = told(data_folder, tmp_path, lambda text: "z" * 90 if text.startswith("train 3") else text)
    path = make_run_config("long", data={**rows, "long_prompts": "error"})
    result = run_gkd(["train", path])
    assert result.returncode == 2
    assert f"{rows['train']}:4: teacher reads " in result.stderr and "data.max_prompt_tokens = 64" in result.stderr
    assert "starting the sampler" not in result.stderr
    shown = check(run_gkd(["train", path, "--dry-run", "teacher.max_prompt_tokens=200"])).stderr
    assert f"{rows['train']}:1, as both sides read it before the completion:" in shown and "teacher: " in shown
    plain = check(run_gkd(["train", make_run_config("plain"), "--dry-run"])).stderr
    assert "as both sides read it" not in plain


def test_a_teacher_that_reads_the_same_as_itself_is_refused(make_run_config: MakeConfig, tmp_path: Path) -> None:
    path = make_run_config("itself", mixture={"student": 1.0, "teacher": 0.0, "dataset": 0.0})
    for weights, option in (("live", "--dry-run"), ("initial", "run.steps=1")):
        own = f"teacher={{model: student, weights: {weights}}}"
        result = run_gkd(["train", path, option, own] if option != "--dry-run" else ["train", path, own, option])
        assert result.returncode == 2 and f"teacher.weights: {weights}: student and teacher are one" in result.stderr
    assert not (tmp_path / "itself").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", pytest.param("initial", marks=pytest.mark.long)])
def test_a_student_that_taught_itself_is_evaluated_beside_what_it_was(
    make_run_config: MakeConfig, tmp_path: Path, data_folder: Path, tiny_student: Path, weights: str
) -> None:
    """The teacher of `gkd eval` is the initial student behind its own view, whatever taught."""
    (tmp_path / "more").mkdir()
    more = told(data_folder, tmp_path / "more", lambda text: f"{text} {TOLD}")
    config = make_run_config(
        data=more,
        teacher={"model": "student", "weights": weights, "max_prompt_tokens": 100},
        student={"model": str(tiny_student)},
        mixture={"student": 1.0, "teacher": 0.0, "dataset": 0.0},
        run={"steps": 3},
        optim={"lr": 5e-3},
    )
    check(run_gkd(["train", config]))
    resolved = tmp_path / "tiny" / "config.resolved.json"
    evaluated = check(run_gkd(["eval", resolved, "--only", "task", "--format", "json"]))
    figures = json.loads(evaluated.stdout.splitlines()[-1])["task"]["figures"]
    before, after = (figures["forward_kl"][f"student_{when}"]["value"] for when in ("before", "after"))
    assert before > 1e-4, "it reads less than its teacher"
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert before == pytest.approx(summary["heldout_forward_kl_before"], rel=1e-3)
    assert after != pytest.approx(before, rel=1e-3)
