"""Fixtures that every folder of tests uses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny_model

from gkd.config import cache_folder
from gkd.environment import prepare_process

pytest_plugins = ["leftovers", "skips"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
prepare_process()  # before any test imports torch


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command run in this process says what it does from then on: no later test shall find that in its own log."""
    logger = logging.getLogger("gkd")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fresh cache, or a text or score of an earlier run would stand in for what no longer works.

    A converted wheel and the layers of its cuts, which take minutes, are shared with other runs.
    """
    shared, own = cache_folder(), tmp_path_factory.getbasetemp() / "cache"
    own.mkdir()
    for name in ("models", "cuts"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(shared / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKD_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 4-layer model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "teacher", seed=1, layers=4)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 2-layer model with the same tokenizer and a tied head."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "student", seed=2, layers=2)


@pytest.fixture(scope="session")
def tiny_untied_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "untied", seed=3, layers=2, tied=False)
