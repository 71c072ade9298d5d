"""A run on the tiny models, as a user would start it: a config file and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from launching import MakeConfig, check, run_gkd

from gkd.rollout import offline

ROWS = 24


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and heldout.jsonl with completions, of ragged lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS), ("heldout", 6)):
        lines = [
            {"prompt": [{"role": "user", "content": f"{name} {i} " + "x" * (i % 7)}],
             "completion": [{"role": "assistant", "content": "y" * (1 + i % 5)}]}
            for i in range(rows)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_run_config(
    folder: Path, name: str, data_folder: Path, models: tuple[Path, Path], sections: dict[str, dict[str, Any]]
) -> Path:
    """A config in `folder`, whose run folder is `folder`/`name`, for `models`, teacher and student; `sections` replace
    whole sections or single keys of them."""
    teacher, student = models
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(folder / name), "steps": 3, "seed": 5},
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"model": str(student), "dtype": "float32"},
        "data": {"train": str(data_folder / "train.jsonl"), "heldout": str(data_folder / "heldout.jsonl"),
                 "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 12},
        "mixture": {"student": 0.6, "teacher": 0.2, "dataset": 0.2},
        "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 1},
        "eval": {"prompts": 5, "samples": 2},
    }  # fmt: skip
    for section, keys in sections.items():
        values.setdefault(section, {}).update(keys)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def make_run_config(tmp_path: Path, data_folder: Path, tiny_teacher: Path, tiny_student: Path) -> MakeConfig:
    """Writes a config for a run folder in `tmp_path`."""

    def make(name: str = "tiny", **sections: dict[str, Any]) -> Path:
        return write_run_config(tmp_path, name, data_folder, (tiny_teacher, tiny_student), sections)

    return make


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, tiny_teacher: Path, tiny_student: Path
) -> Callable[..., Path]:
    """The folder of a run of one process that others are compared with. The same sections are run once, whichever of
    the suite's processes asks first."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    shared.mkdir(exist_ok=True)

    def run(**sections: dict[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:12]
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name / "summary.json").exists():
                config = write_run_config(shared, name, data_folder, (tiny_teacher, tiny_student), sections)
                check(run_gkd(["train", config, "--overwrite"], GKD_CACHE=str(own / "cache")))
        return shared / name

    return run


@pytest.fixture
def sampling_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's texts are sampled in this process, and not in one of their own."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        offline._run(json.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(offline.subprocess, "run", run)
