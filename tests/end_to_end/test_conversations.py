"""Runs in which the student talks to an environment: several sources and ranks, replay, a report, what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_runs import Bare, StopsInTheMiddle, ran, with_tasks, without_times
from launching import MakeConfig, check, environment, read_metrics, run_gkd, torchrun

from gkd.config import load_config
from gkd.errors import ConfigError
from gkd.train.distiller import Distiller

GAME = {"kind": "text_game", "max_turns": 3, "turn_tokens": 5, "max_observation_tokens": 20}
SECTIONS: dict[str, dict[str, Any]] = {"rollout": {"max_new_tokens": 150}, "environment": GAME}


@pytest.fixture
def games(data_folder: Path, tmp_path: Path) -> dict[str, str]:
    folder = with_tasks(data_folder, tmp_path, {"rooms": 3, "seed": 2})
    return {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")}


@pytest.mark.slow
def test_a_run_and_its_report(make_run_config: MakeConfig, games: dict[str, str], tmp_path: Path) -> None:
    config = make_run_config("talks", **SECTIONS, data=games)
    said = check(run_gkd(["train", config, "--dry-run"])).stderr
    assert "environment: text_game, turns: 3; after a turn the student reads '<|end|>\\n<|start|>user" in said
    check(run_gkd(["train", config]))
    records = read_metrics(tmp_path / "talks")
    for record in records:
        assert record["environment/turns"] == 3 and record["reward/mean"] == 0 and record["mixture/dataset"] >= 0
        assert record["environment/observed_tokens"] == 80 and record["environment/timeout_share"] == 0
        assert record["mismatch/k3"] < 1e-6, "a turn's log-probabilities are those of the trainer"
    samples = (tmp_path / "talks" / "samples.md").read_text()
    assert "> user\n> That is no command." in samples and "(3 turns, no turn was left, reward 0)" in samples
    answers = json.loads((tmp_path / "talks" / "samples" / "tokens_after.json").read_text())["answers"]
    known = [token["forward_kl"] is not None for token in answers[0]["tokens"]]
    assert sum(known) == 15 and not all(known)
    first = (tmp_path / "talks" / "samples" / "first_batch.txt").read_text()
    assert "3 turns of 15" in first and "That is no command."[:20] in first.replace("[", "").replace("]", "")
    check(run_gkd(["report", tmp_path / "talks"]))
    assert "That is no command." in (tmp_path / "talks" / "report.html").read_text()


@pytest.mark.slow
def test_two_ranks_hold_the_same_conversations(
    make_run_config: MakeConfig, games: dict[str, str], tmp_path: Path
) -> None:
    sections = {**SECTIONS, "data": games, "eval": {"prompts": 2, "samples": 1}, "run": {"steps": 2}}
    check(run_gkd(["train", make_run_config("one", **sections)]))
    check(torchrun(2, ["-m", "gkd", "train", make_run_config("two", **sections, deepspeed={"zero_stage": 3})]))
    one, two = (read_metrics(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("loss", "grad_norm", "divergence/forward_kl"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for name in ("tokens/scored", "tokens/generated", "environment/turns", "environment/observed_tokens"):
        assert two[name] == one[name], name


@pytest.mark.usefixtures("sampling_here")
def test_replayed_conversations_go_on_bitwise(make_run_config: MakeConfig, games: dict[str, str]) -> None:
    def config(name: str) -> Any:
        mixture = {"student": 0.5, "teacher": 0.2, "dataset": 0.0, "replay": 0.3}
        sections = {**SECTIONS, "mixture": mixture, "data": games, "eval": {"prompts": 1, "samples": 1}}
        ramp = {"from": 1, "to": 3, "steps": 1}
        return load_config(make_run_config(
            name, **{**sections, "run": {"steps": 2, "save_every": 1}, "environment": {**GAME, "max_turns": ramp}}
        ))  # fmt: skip

    whole, weights = ran(Bare, config("whole"))
    assert [record["environment/turns"] > 1 for record in whole] == [False, True]
    first, _ = ran(StopsInTheMiddle, config("halves"))
    second, resumed = ran(Bare, config("halves"), resume=True)
    assert without_times([*first, *second]) == without_times(whole)
    assert weights and all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


PLUGIN = """
import os

from gkd.environments import Environment, EnvironmentKind, Observed
from gkd.plugins import register_environment


class Broken(Environment):
    def reset(self, task): pass

    def step(self, turn):
        if "elsewhere" in os.environ.get("FAILS", "") and os.environ.get("RANK") != "1":
            return Observed("", done=True)
        raise KeyError("lost")


class BrokenKind(EnvironmentKind):
    depth: int = 3

    def open(self): return Broken()


register_environment("broken", BrokenKind)
"""


@pytest.mark.slow
def test_a_users_environment_that_fails_is_one_line(
    make_run_config: MakeConfig, games: dict[str, str], tmp_path: Path
) -> None:
    package = tmp_path / "installed"
    package.mkdir()
    (package / "my_worlds.py").write_text(PLUGIN)
    sections: dict[str, Any] = {**SECTIONS, "data": games, "eval": {"prompts": 1, "samples": 0}}
    config = make_run_config("broken", **{**sections, "environment": {"kind": "broken", "depth": 4}})
    config.write_text(f"plugins: [my_worlds]\n{config.read_text()}")
    failed = run_gkd(["train", config], PYTHONPATH=str(package))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "environment: broken: " in failed.stderr and "turn 1: KeyError: 'lost'" in failed.stderr
    assert "train.jsonl:" in failed.stderr
    alone = torchrun(2, ["-m", "gkd", "train", config, "--overwrite"], PYTHONPATH=str(package), FAILS="elsewhere")
    assert alone.returncode != 0 and "rank 1: environment: broken: " in alone.stderr, "all ranks end, and none waits"


@pytest.mark.slow
def test_one_over_http_is_the_same_run(make_run_config: MakeConfig, games: dict[str, str], tmp_path: Path) -> None:
    """Bit by bit; and once it is gone, the next run says so."""
    sections: dict[str, Any] = {**SECTIONS, "data": games, "eval": {"prompts": 1, "samples": 1}, "run": {"steps": 2}}
    command = [sys.executable, "-m", "gkd", "serve-environment", "text_game", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            there = {**GAME, "kind": "http", "address": address}
            check(run_gkd(["train", make_run_config("here", **sections)]))
            check(run_gkd(["train", make_run_config("there", **{**sections, "environment": there})]))
        finally:
            server.kill()
    assert without_times(read_metrics(tmp_path / "there")) == without_times(read_metrics(tmp_path / "here"))
    refused = run_gkd(["train", make_run_config("gone", **{**sections, "environment": there}), "--dry-run"])
    assert refused.returncode == 2 and f"environment.address: nothing answers at {address}" in refused.stderr


def test_what_is_wrong_is_said_before_anything_starts(
    make_run_config: MakeConfig, data_folder: Path, games: dict[str, str], change_template: Callable[[str], Path]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({**SECTIONS}, 'train.jsonl:1: task: expected {"rooms": 2 to 64'),
        ({**SECTIONS, "data": games, "student": {"model": str(change_template("drops"))}}, "writes another history"),
        (
            {**SECTIONS, "data": games, "student": {"model": str(change_template("hides"))}},
            "does not show the assistant",
        ),
    ]
    for sections, message in cases:
        refused = run_gkd(["train", make_run_config("wrong", **sections), "--dry-run"])
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


def test_a_verifier_of_one_turn_needs_no_place_for_another(
    make_run_config: MakeConfig, data_folder: Path, tmp_path: Path, change_template: Callable[[str], Path]
) -> None:
    folder = with_tasks(data_folder, tmp_path, {"answer": 3})
    data = {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")}
    sections = {"data": data, "student": {"model": str(change_template("drops"))}}
    one_turn = [{"kind": "answer"}, {"kind": "calculator", "max_turns": 1}]
    for kind, said in zip(one_turn, ("answer, match: number, one turn", "calculator, turns: 1"), strict=True):
        config = load_config(make_run_config("judged", **sections, environment={**kind, "turn_tokens": 12}))
        assert f"environment: {said}" in Distiller(config).check()
    config = load_config(make_run_config("talks", **sections, environment={"kind": "calculator", "max_turns": 2}))
    with pytest.raises(ConfigError, match="writes another history"):
        Distiller(config).check()


@pytest.fixture
def change_template(tiny_student: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The student with a template that shows earlier turns otherwise, or not at all."""
    import shutil

    from tiny import CHAT_TEMPLATE

    changes = {
        "drops": ("{{ message['content'] }}", "{{ message['content'].replace('Yes.', 'No.') }}"),
        "hides": (
            "{{ message['content'] }}",
            "{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}",
        ),
    }

    def change(how: str) -> Path:
        folder = tmp_path / how
        if not folder.exists():
            shutil.copytree(tiny_student, folder)
            template = CHAT_TEMPLATE.replace(*changes[how])
            (folder / "chat_template.jinja").write_text(template)
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        return folder

    return change


JUDGE = """
from gkd.environments import Environment, EnvironmentKind, Observed
from gkd.plugins import register_environment


class Counts(Environment):
    def reset(self, task): pass

    def step(self, turn):
        return Observed("", done=True, reward=float(len(turn) % 3))


class CountsKind(EnvironmentKind):
    def open(self): return Counts()


register_environment("counts", CountsKind)
"""


@pytest.mark.slow
def test_rewards_of_one_turn_are_compared_over_ranks(
    make_run_config: MakeConfig, data_folder: Path, tmp_path: Path
) -> None:
    """A prompt's samples are on both ranks, and some are the teacher's."""
    package = tmp_path / "installed"
    package.mkdir()
    (package / "my_judges.py").write_text(JUDGE)
    sections: dict[str, Any] = {
        "run": {"steps": 2},
        "environment": {"kind": "counts"},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 12, "stop_token_ids": list(range(3, 60))},
        "mixture": {"student": 0.6, "teacher": 0.4, "dataset": 0.0},
        "objective": {
            "terms": [
                {"kind": "policy_gradient", "advantage": "reward", "clip_range": 0.2, "on": ["student"]},
                {"kind": "forward_kl", "on": ["teacher"]},
                {"kind": "reverse_kl", "on": ["student"], "reward_below": 1.0, "weight": 0.5},
            ]
        },
        "eval": {"prompts": 2, "samples": 1},
    }
    for name in ("one", "two"):
        config = make_run_config(name, **sections, **({"deepspeed": {"zero_stage": 3}} if name == "two" else {}))
        config.write_text(f"plugins: [my_judges]\n{config.read_text()}")
        command = ["train", config]
        started = run_gkd(command, PYTHONPATH=str(package)) if name == "one" else torchrun(
            2, ["-m", "gkd", *command], PYTHONPATH=str(package)
        )  # fmt: skip
        check(started)
    one, two = (read_metrics(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("loss", "grad_norm", "objective/policy_gradient/loss", "objective/reverse_kl/loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name
    for name in ("reward/mean", "reward/flat_share", "tokens/scored", "environment/done_share", "mixture/teacher"):
        assert two[name] == one[name], name
    assert 0 < one["reward/mean"] < 2 and one["reward/flat_share"] < 1 and one["mixture/teacher"] > 0
    assert abs(one["objective/policy_gradient/loss"]) > 1e-3 and one["environment/turns"] == 1
