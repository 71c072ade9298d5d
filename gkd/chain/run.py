"""Runs the stages of a chain: what is done is skipped, what was interrupted goes on, what fails stops the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from gkd.chain.inputs import changed_keys
from gkd.chain.kinds import Action
from gkd.chain.spec import Chain, Reference, Stage
from gkd.environment import die_with_parent, shell_status
from gkd.errors import InputError, StageError
from gkd.files import write_json
from gkd.run_files import RunFiles

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
        self._chain, self._kind = chain, stage.kind
        self._task = stage.task(self._file(stage), self._output)
        self.inputs = stage.kind.inputs(self._task)
        before = record[stage.name]
        self._changed = changed_keys(before.get("inputs", self.inputs), self.inputs)
        self.action: Action = self._decide(stage, before)

    def describe(self) -> str:
        named = ", ".join(self._changed[:_NAMED_KEYS]) + (", ..." if len(self._changed) > _NAMED_KEYS else "")
        what = {"skip": "done before", "resume": "goes on", "start": self._kind.name, "start anew": "again"}
        return what[self.action] + (f": other {named}" if self._changed else "")

    def command(self) -> list[str]:
        return self._kind.command(self._task, self.action)

    def _decide(self, stage: Stage, before: Mapping[str, Any]) -> Action:
        if before.get("is_done") and not self._changed and self._kind.is_there(stage.folder):
            return "skip"
        return self._kind.decide(stage.folder, has_begun=bool(before), changed=self._changed)

    def _file(self, stage: Stage) -> str:
        if isinstance(stage.file, Reference):
            return str(RunFiles(self._chain.stage(stage.file.stage).folder).config)
        return stage.file

    def _output(self, reference: Reference) -> str:
        stage = self._chain.stage(reference.stage)
        return str(stage.kind.output(stage.folder))


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
