"""gkd doctor tries out a machine."""

from __future__ import annotations

import importlib.metadata
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gkd.config import Config, make_config
from gkd.doctor import examine


def findings(config: Config | None = None) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.level, finding.text) for finding in examine(config)}


def config(folder: Path, teacher: Path, **run: Any) -> Config:
    models = {"teacher": {"model": str(teacher)}, "student": {"model": str(teacher), "dtype": "float32"}}
    return make_config({**models, "data": {"train": "d.jsonl"}, "run": {"dir": str(folder / "run"), **run}})


def test_nothing_is_wrong_and_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    found = findings()
    assert {"packages", "vLLM", "git", "compiler", "/dev/shm", "loopback", "cache", "temporary files"} <= found.keys()
    assert all(level != "fault" for level, _ in found.values())
    assert not list(tmp_path.iterdir())


@pytest.mark.fault
def test_what_is_wrong_with_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.0.0" if name == "transformers" else versions(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    monkeypatch.setenv("GKD_CACHE", "/proc/cache")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=64 << 20, free=64 << 20))

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    found = findings()
    expected = {
        "transformers": ("warning", "is 4.0.0; tested with <5.20,>=5.16.1"),
        "git": ("warning", "none of git in PATH"),
        "compiler": ("warning", "none of c++, g++, clang++ in PATH"),
        "/dev/shm": ("warning", "has 0.1 GB, which NCCL"),
        "loopback": ("fault", "no port of 127.0.0.1 can be bound (Cannot assign requested address)"),
        "cache": ("fault", "/proc: "),
        "temporary files": ("warning", "has 0.1 GB free; 1.1 GB may be needed"),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": ("warning", "is set: vLLM takes pickles"),
    }
    for what, (level, text) in expected.items():
        assert found[what][0] == level and text in found[what][1], found[what]
    assert "VLLM_SERVER_DEV_MODE" not in found


@pytest.mark.fault
def test_the_room_that_a_run_takes(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is 12 bytes a parameter here; two are kept and a third is written."""
    level, text = findings(config(tmp_path, tiny_teacher))["run folder"]
    assert level == "ok" and "a checkpoint takes 0.0 GB" in text
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=1 << 40, free=3_000_000))
    assert findings(config(tmp_path, tiny_teacher))["run folder"][0] == "ok"
    level, text = findings(config(tmp_path, tiny_teacher, save_every=1, keep_checkpoints=2))["run folder"]
    assert level == "warning" and "may be needed at once" in text
    level, text = findings(config(tmp_path, tmp_path))["run folder"]
    assert level == "warning" and "its size is not known: teacher.model" in text
    level, text = findings(config(Path("/proc"), tmp_path))["run folder"]
    assert level == "fault" and text.startswith("/proc: ")
