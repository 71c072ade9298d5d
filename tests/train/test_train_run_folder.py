"""Who may use a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gkd.config import Config, make_config
from gkd.errors import RunFolderError
from gkd.run_files import RunFiles
from gkd.train.run_folder import RunFolder, check_inputs


def config(**sections: dict[str, Any]) -> Config:
    return make_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}, **sections})


def open_and_close(path: Path, config: Config, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    folder = RunFolder(path)
    folder.open(config, resume=resume, overwrite=overwrite)
    folder.close()
    return folder


def test_a_fresh_folder_holds_config_and_environment(tmp_path: Path) -> None:
    open_and_close(tmp_path / "run", config())
    assert json.loads((tmp_path / "run" / "config.resolved.json").read_text())["teacher"]["model"] == "t"
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"python", "packages", "git_revision", "command"} <= environment.keys()


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    open_and_close(tmp_path, config())
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds a run; continue it with --resume"):
        open_and_close(tmp_path, config())
    assert (tmp_path / "metrics.jsonl").exists(), "a refusal removes nothing"
    open_and_close(tmp_path, config(), overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "thesis.tex").read_text() == "mine", "only what a run writes is replaced"


def test_a_start_that_failed_is_in_nobodys_way(tmp_path: Path) -> None:
    open_and_close(tmp_path, config())
    (tmp_path / "student_init").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    open_and_close(tmp_path, config(optim={"lr": 0.1}))
    assert not (tmp_path / "student_init").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.open(config(), resume=False, overwrite=False)
    with pytest.raises(RunFolderError, match="in use by another process"):
        open_and_close(tmp_path, config(), overwrite=True)
    first.close()


def test_a_resume_needs_a_run_that_fits(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        open_and_close(tmp_path, config(), resume=True)
    open_and_close(tmp_path, config())
    open_and_close(tmp_path, config(run={"steps": 7, "save_every": 3}), resume=True)
    with pytest.raises(RunFolderError, match=r"optim\.lr was 1e-05, is 0\.1; run\.seed was 0, is 4"):
        open_and_close(tmp_path, config(optim={"lr": 0.1}, run={"seed": 4}), resume=True)


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
    open_and_close(tmp_path, config(teacher=served))
    open_and_close(tmp_path, config(teacher={**served, "addresses": ["http://10.0.0.9:8300"]}), resume=True)


@pytest.mark.fault
def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    open_and_close(tmp_path, config())
    (tmp_path / "final").mkdir()
    with pytest.raises(RunFolderError, match="is finished and saved no checkpoint"):
        open_and_close(tmp_path, config(run={"steps": 200}), resume=True)
    (tmp_path / "checkpoints").mkdir()
    open_and_close(tmp_path, config(run={"steps": 200}), resume=True)


@pytest.mark.fault
def test_who_is_refused_leaves_the_folder_free(tmp_path: Path) -> None:
    open_and_close(tmp_path, config())
    (tmp_path / "metrics.jsonl").write_text("{}")
    try:
        open_and_close(tmp_path, config())
    except RunFolderError:
        open_and_close(tmp_path, config(), overwrite=True)  # the error, and with it the folder, is still there
