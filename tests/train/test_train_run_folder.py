"""Who may use a run folder."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gkd.config import Config, Launch, make_config
from gkd.errors import ModelError, RunFolderError, RunInterruptedError
from gkd.run_files import RunFiles
from gkd.train.run_folder import check_inputs, claimed_folder


def config(path: Path, *, run: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    models = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}
    return make_config({**models, "run": {"dir": str(path), **(run or {})}, **sections})


def begin(config: Config, *, resume: bool = False, overwrite: bool = False) -> RunFiles:
    """A start whose models and data were good."""
    with claimed_folder(config, Launch(), resume=resume, overwrite=overwrite) as folder:
        folder.begin()
        logging.getLogger("gkd").warning("the log of seed %d", config.run.seed)
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_fresh_folder_holds_config_and_environment(tmp_path: Path) -> None:
    files = begin(config(tmp_path / "run"))
    assert json.loads(files.config.read_text())["teacher"]["model"] == "t"
    environment = json.loads(files.environment.read_text())
    assert {"python", "packages", "git_revision", "command"} <= environment.keys()
    assert json.loads(files.marker.read_text())["run"] == "run"


@pytest.mark.fault
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_own_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    """Names that a run writes too, but no run's marker."""
    for name in ("samples/a.wav", "wandb/run", "tensorboard/events", "report.html", "eval.json", "final/x", "logs/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds what no run of gkd wrote \(eval\.json, final, logs, "):
        begin(config(tmp_path), overwrite=overwrite)
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        begin(config(tmp_path), resume=True)
    assert contents(tmp_path) == before


def used(path: Path, seed: int = 0) -> RunFiles:
    """A finished run, and a file of its owner's."""
    files = begin(config(path, run={"seed": seed}), overwrite=True)
    files.metrics.write_text("{}")
    files.final.mkdir()
    (files.final / "model.safetensors").write_text(f"weights of seed {seed}")
    (path / "thesis.tex").write_text("mine")
    return files


def test_a_used_folder_is_refused_and_overwriting_moves_the_run_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gkd")
    files = used(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match=r"holds a run; continue it with --resume, start anew with --overwrite"):
        begin(config(tmp_path))
    assert contents(tmp_path) == before, "a refusal changes nothing"
    begin(config(tmp_path), overwrite=True)
    moved = RunFiles(files.previous)
    assert not files.metrics.exists() and moved.metrics.read_text() == "{}"
    assert (moved.final / "model.safetensors").read_text() == "weights of seed 0"
    assert "the log of seed 0" in (moved.logs / "rank_0.log").read_text()
    assert (tmp_path / "thesis.tex").read_text() == "mine", "only what a run writes is moved"
    assert f"the run that {tmp_path} held is in {files.previous}" in caplog.messages


def test_one_run_before_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However often a quickstart is repeated, the disk holds two runs; a start that failed displaces none."""
    caplog.set_level(logging.INFO, "gkd")
    for seed in range(3):
        used(tmp_path, seed)
    begin(config(tmp_path), overwrite=True)
    begin(config(tmp_path), overwrite=True)  # the one before got no further
    assert caplog.messages[-1].startswith("the log of") and "the one that was there is gone" in caplog.text
    assert (tmp_path / "previous" / "final" / "model.safetensors").read_text() == "weights of seed 2"
    assert not (tmp_path / "previous" / "previous").exists()


@pytest.mark.fault
def test_nothing_is_touched_before_the_run_begins(tmp_path: Path) -> None:
    """Models or data may turn out to be wrong, or another rank may be slower to hear of a refusal."""
    used(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ModelError), claimed_folder(config(tmp_path), Launch(), overwrite=True):
        raise ModelError("teacher.model: no such folder")
    with claimed_folder(config(tmp_path), Launch(rank=1, world_size=2)):
        pass
    assert contents(tmp_path) == before


def test_whoever_goes_on_in_a_folder_is_the_same_run_to_its_servers(tmp_path: Path) -> None:
    def run_id(name: str, **how: bool) -> str:
        with claimed_folder(config(tmp_path / name), Launch(), **how) as folder:
            folder.begin()
            return folder.run_id

    first = run_id("a")
    assert len(first) == 32 and run_id("a", resume=True) == run_id("a", overwrite=True) == first
    assert run_id("b") != first
    for damaged in ("", "{", "[]", '{"id": 3}'):
        (tmp_path / "b" / ".gkd-run").write_text(damaged)
        assert len(run_id("b", resume=True)) == 32


def test_a_start_that_failed_is_in_nobodys_way(tmp_path: Path) -> None:
    begin(config(tmp_path))
    (tmp_path / "student_init").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    begin(config(tmp_path, optim={"lr": 0.1}))
    assert not (tmp_path / "student_init").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with claimed_folder(config(tmp_path), Launch()), pytest.raises(RunFolderError, match="in use by another process"):
        begin(config(tmp_path), overwrite=True)


def test_a_resume_needs_a_run_that_fits(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        begin(config(tmp_path), resume=True)
    begin(config(tmp_path))
    begin(config(tmp_path, run={"steps": 7, "save_every": 3}), resume=True)
    with pytest.raises(RunFolderError, match=r"optim\.lr was 1e-05, is 0\.1; run\.seed was 0, is 4"):
        begin(config(tmp_path, optim={"lr": 0.1}, run={"seed": 4}), resume=True)


INPUTS = {"data.train": "aa", "teacher.model": "bb", "deepspeed.config": {"zero_optimization": {"stage": 1}}}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data.train": "cc"}, "data.train was 'aa', is 'cc'"),
        ({"teacher.model": "cc"}, "teacher.model was 'bb', is 'cc'"),
        (
            {"deepspeed.config": {"zero_optimization": {"stage": 2}}},
            "deepspeed.config.zero_optimization.stage was 1, is 2",
        ),
    ],
)
def test_a_resume_needs_the_contents_that_the_run_had(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = RunFiles(tmp_path)
    check_inputs(folder, INPUTS, resume=False)
    check_inputs(folder, INPUTS, resume=True)
    with pytest.raises(RunFolderError, match=f"was started with other contents: {message}.*; bring the old"):
        check_inputs(folder, {**INPUTS, **changed}, resume=True)
    check_inputs(folder, INPUTS, resume=True)


def test_a_resume_may_find_its_servers_elsewhere(tmp_path: Path) -> None:
    served = {"model": "t", "placement": "served", "addresses": ["http://10.0.0.1:8300"], "max_concurrency": 2}
    begin(config(tmp_path, teacher=served))
    begin(config(tmp_path, teacher={**served, "addresses": ["http://10.0.0.9:8300"]}), resume=True)


@pytest.mark.fault
def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    begin(config(tmp_path))
    (tmp_path / "final").mkdir()
    with pytest.raises(RunFolderError, match="is finished and saved no checkpoint"):
        begin(config(tmp_path, run={"steps": 200}), resume=True)
    (tmp_path / "checkpoints").mkdir()
    begin(config(tmp_path, run={"steps": 200}), resume=True)


@pytest.mark.fault
def test_who_is_refused_leaves_the_folder_free(tmp_path: Path) -> None:
    used(tmp_path)
    try:
        begin(config(tmp_path))
    except RunFolderError:
        begin(config(tmp_path), overwrite=True)  # the error, and with it the folder, is still there


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (RunInterruptedError("stopped"), 75), (ModelError("x"), 2), (OSError("x"), 1), (SystemExit(143), 143)],
)
def test_how_a_run_ended_stands_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: int
) -> None:
    """And where `gkd launch` looks."""
    monkeypatch.setenv("GKD_EXIT_FILE", str(tmp_path / "copy.json"))
    with suppress(BaseException), claimed_folder(config(tmp_path / "run"), Launch()) as folder:
        folder.begin()
        if error is not None:
            raise error
    for file in (tmp_path / "run" / "exit.json", tmp_path / "copy.json"):
        assert json.loads(file.read_text())["status"] == status


@pytest.mark.fault
def test_who_is_refused_says_nothing_in_anothers_folder(tmp_path: Path) -> None:
    used(tmp_path).checkpoints.mkdir()
    before = contents(tmp_path)
    with pytest.raises(RunFolderError):
        begin(config(tmp_path))
    assert contents(tmp_path) == before
    begin(config(tmp_path), resume=True)
    with pytest.raises(ModelError), claimed_folder(config(tmp_path), Launch(), resume=True) as folder:
        assert not folder.exit.exists(), "this one may be killed"
        raise ModelError("x")
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == 2, "not the end of the run before"


@pytest.mark.fault
def test_what_a_killed_process_left_unfinished_is_gone_with_the_next(tmp_path: Path) -> None:
    files = used(tmp_path)
    for name in (".final.0123abcd.partial", ".student_init.0123abcd.partial", "checkpoints/.step_4.tmp"):
        (tmp_path / name).mkdir(parents=True)
    begin(config(tmp_path), resume=True)
    assert not list(tmp_path.rglob(".*.partial")) and not list(files.checkpoints.iterdir())


@pytest.mark.fault
def test_a_resume_of_damaged_files_is_one_line(tmp_path: Path) -> None:
    files = begin(config(tmp_path))
    files.config.write_text(files.config.read_text()[:200])
    with pytest.raises(RunFolderError, match=r"^--resume: .*config\.resolved\.json:\d+: "):
        begin(config(tmp_path), resume=True)
    files.inputs.write_text("{")
    with pytest.raises(RunFolderError, match=r"^--resume: .*inputs\.json:1: "):
        check_inputs(files, {}, resume=True)


@pytest.mark.fault
def test_a_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(begin(config(tmp_path / "run")).environment.read_text())["git_revision"] is None


@pytest.mark.fault
def test_how_a_run_ended_hides_no_error_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the first error"), claimed_folder(config(tmp_path), Launch()) as folder:
        folder.begin()
        folder.exit.mkdir()
        raise ModelError("the first error")
