"""Runs the stages of a chain: what is done is skipped, what was interrupted goes on, what fails stops the rest."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from gkd.chain.inputs import STEPS, changed_keys, stage_inputs
from gkd.chain.spec import Chain, Reference, Stage, override_words
from gkd.config import Config, load_config
from gkd.environment import die_with_parent, shell_status
from gkd.errors import InputError, StageError
from gkd.files import write_json
from gkd.run_files import RunFiles

Action = Literal["skip", "resume", "start", "start anew"]
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_NAMED_KEYS = 5  # of those that differ


def run_chain(chain: Chain, say: Callable[[str], None]) -> None:
    """Every stage as a process of its own, in the chain's order. `say` is told of each.

    Raises StageError for a stage that fails, with its exit code, and InputError for a record that cannot be read.
    """
    record = _Record(chain.folder / "chain.json")
    for number, stage in enumerate(chain.stages, 1):
        work = _Work(chain, stage, record)
        say(f"stage {number}/{len(chain.stages)}: {stage.name} ({work.describe()})")
        if work.action == "skip":
            continue
        record.begins(stage.name, work.inputs)
        started = time.monotonic()
        status = _wait_for(work.command())
        if status:
            where = f"its folder is {stage.folder}; the same command goes on with it"
            raise StageError(f"stage {stage.name} ended with {status}; {where}", status)
        record.is_done(stage.name, time.monotonic() - started)


class _Record:
    """`chain.json`: of each stage that has begun, what it is made of, whether it is done, and the seconds it took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self._stages = json.loads(path.read_text())["stages"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: cannot be read ({error}); remove it, and every stage runs anew") from None

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Empty for a stage that has not begun."""
        return self._stages.get(name, {})

    def begins(self, name: str, inputs: dict[str, Any]) -> None:
        self._stages[name] = {"inputs": inputs, "is_done": False}
        self._write()

    def is_done(self, name: str, wall_s: float) -> None:
        self._stages[name] |= {"is_done": True, "wall_s": round(wall_s, 1)}
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"stages": self._stages})


class _Work:
    """A stage whose predecessors are done: what is to be done for it, and by which command."""

    def __init__(self, chain: Chain, stage: Stage, record: _Record) -> None:
        self._chain, self._stage = chain, stage
        self.inputs = stage_inputs(self._config())
        before = record[stage.name]
        self._changed = changed_keys(before.get("inputs", self.inputs), self.inputs)
        self.action: Action = self._decide(bool(before), bool(before.get("is_done")))

    def describe(self) -> str:
        named = ", ".join(self._changed[:_NAMED_KEYS]) + (", ..." if len(self._changed) > _NAMED_KEYS else "")
        what = {"skip": "done before", "resume": "goes on", "start": self._stage.run, "start anew": "again"}
        return what[self.action] + (f": other {named}" if self._changed else "")

    def command(self) -> list[str]:
        stage = self._stage
        words = [stage.run, self._file(), *override_words(stage, self._output)]
        if stage.run == "eval":
            return [sys.executable, "-m", "gkd", *words, "--out", str(stage.folder)]
        words.append(f"run.dir={json.dumps(str(stage.folder))}")
        words += {"resume": ["--resume"], "start anew": ["--overwrite"]}.get(self.action, [])
        if stage.launcher is None:
            return [sys.executable, "-m", "gkd", *words]
        return [sys.executable, "-m", "gkd", "launch", "--", *shlex.split(stage.launcher), "gkd", *words]

    def _decide(self, has_begun: bool, is_done: bool) -> Action:
        files = RunFiles(self._stage.folder)
        if is_done and not self._changed and (files.final if self._stage.run == "train" else files.evaluation).exists():
            return "skip"
        if self._stage.run == "eval" or not files.config.exists():
            return "start"
        if has_begun and set(self._changed) <= {STEPS} and any(files.checkpoints.glob("step_*")):
            return "resume"
        return "start anew"

    def _config(self) -> Config:
        return load_config(self._file(), override_words(self._stage, self._output))

    def _file(self) -> str:
        if isinstance(self._stage.file, Reference):
            return str(RunFiles(self._chain.stage(self._stage.file.stage).folder).config)
        return self._stage.file

    def _output(self, reference: Reference) -> str:
        return str(RunFiles(self._chain.stage(reference.stage).folder).final)


def _wait_for(command: list[str]) -> int:
    """Its exit code, as a shell has it. Signals go to it, and it ends with this process."""
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM))
    with _handed_on(process):
        code = process.wait()
    return shell_status(code)


@contextmanager
def _handed_on(process: subprocess.Popen[bytes]) -> Generator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        with suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
