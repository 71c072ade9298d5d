"""A run on the tiny models, as a user would start it: a config file and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import MakeConfig

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


@pytest.fixture
def make_run_config(tmp_path: Path, data_folder: Path, tiny_teacher: Path, tiny_student: Path) -> MakeConfig:
    """Writes a config; keyword arguments replace whole sections or single keys of them."""

    def make(name: str = "tiny", **sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": name, "dir": str(tmp_path / name), "steps": 3, "seed": 5},
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(data_folder / "train.jsonl"), "heldout": str(data_folder / "heldout.jsonl"),
                     "max_prompt_tokens": 64},
            "rollout": {"engine": "transformers", "max_new_tokens": 12},
            "mixture": {"student": 0.6, "teacher": 0.2, "dataset": 0.2},
            "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 1},
            "eval": {"prompts": 5, "samples": 2},
        }  # fmt: skip
        for section, keys in sections.items():
            values.setdefault(section, {}).update(keys)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
