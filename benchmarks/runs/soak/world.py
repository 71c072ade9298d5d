"""What a soak disturbs: a trainer, a served sampler, a served teacher, and the disk that the run writes to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT, say
from benchmarks.runs import random_model
from gkd.run_files import RunFiles

MARK = "GKD_SOAK"  # in the environment of every process of a soak, whoever started it
PATIENCE_S = 240.0  # nothing here takes so long, however busy the machine
RETRY_S, TIMEOUT_S, SAVE_EVERY = 15, 5, 20
_ROWS, _DISK_MIB = 48, 24
SERVERS = ("sampler", "teacher")
ABANDONED = threading.Event()  # one of the runs failed: the others need not go on


class SoakError(Exception):
    """Something that gkd's documents promise did not happen."""


@dataclass
class Process:
    """One that was started, and what became of it."""

    kind: str
    popen: subprocess.Popen[str]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait(self, what: str, patience_s: float = PATIENCE_S) -> int:
        """Its exit code. Raises SoakError if it still runs so long after."""
        end = time.monotonic() + patience_s
        while self.popen.poll() is None:
            if ABANDONED.is_set() or time.monotonic() > end:
                raise SoakError(f"{self.kind} still runs {patience_s:g} s after {what}\n{self.last_words()}")
            time.sleep(0.05)
        return self.popen.returncode

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


@dataclass
class World:
    """`folder` holds models, data and logs; `disk`, where the run and all temporary files go, may be a small one."""

    folder: Path
    disk: Path
    steps: int
    seed: int
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    running: dict[str, Process] = field(default_factory=dict[str, Process])
    ports: dict[str, int] = field(default_factory=dict[str, int])
    started: int = 0

    @property
    def run(self) -> RunFiles:
        return RunFiles(self.disk / "run")

    # ---- processes

    def start_servers(self) -> None:
        for kind in SERVERS:
            self.ports[kind] = _free_port()
            self.start_server(kind)
        for kind in SERVERS:
            self.wait_until_ready(kind)

    def start_server(self, kind: str) -> None:
        """Where it was before; returns at once."""
        model = self.folder / ("student" if kind == "sampler" else "teacher")
        words = ["benchmarks.runs.without_vllm", f"serve-{kind}", str(model), "--dtype", "float32"]
        self._start(kind, [*words, "--port", str(self.ports[kind])])

    def wait_until_ready(self, kind: str) -> None:
        process = self.running[kind]
        self.wait_for(lambda: "serving " in process.log.read_text(), f"the {kind} to be ready", process)

    def start_trainer(self, *, resume: bool) -> None:
        self._start("trainer", ["gkd", "train", str(self.folder / "run.yaml"), *["--resume"] * resume])

    def _start(self, kind: str, words: list[str]) -> None:
        self.started += 1
        log = self.folder / "logs" / f"{self.started:03}-{kind}.log"
        log.parent.mkdir(exist_ok=True)
        temporary = self.disk / "tmp"
        temporary.mkdir(exist_ok=True)
        own = {
            MARK: self.mark, "TMPDIR": str(temporary), "GKD_CACHE": str(self.disk / "cache"), "OMP_NUM_THREADS": "1",
            "GKD_SERVER_TOKEN": self.mark, "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with log.open("w") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.running[kind] = Process(kind, popen, log)

    def stop_servers(self) -> None:
        """As the documents tell: SIGTERM, which they end on with 0. Raises SoakError for another code."""
        for kind in SERVERS:
            self.running[kind].popen.send_signal(signal.SIGTERM)
        for kind in SERVERS:
            code = self.running[kind].wait("SIGTERM")
            if code:
                raise SoakError(f"{kind} ended with {code} on SIGTERM\n{self.running[kind].last_words()}")

    def end_all(self) -> None:
        for process in self.running.values():
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()

    # ---- the run

    def steps_logged(self) -> int:
        """The last step in the run's metrics, plus one; a line that is half written counts for nothing."""
        with suppress(OSError):
            for line in reversed(self.run.metrics.read_text(errors="replace").splitlines()):
                with suppress(ValueError):
                    return json.loads(line)["step"] + 1
        return 0

    def resumed_at(self) -> int:
        """What the trainer that runs says of it."""
        found = re.search(r"resumed at step (\d+)", self.running["trainer"].log.read_text())
        return int(found[1]) if found else 0

    def wait_for_step(self, step: int) -> bool:
        """Whether it came to be before the trainer ended. Raises SoakError if the trainer makes no step for long."""
        last, trainer = -1, self.running["trainer"]
        while (done := self.steps_logged()) < step and trainer.popen.poll() is None:
            if done != last:
                last, end = done, time.monotonic() + PATIENCE_S
            elif ABANDONED.is_set() or time.monotonic() > end:
                raise SoakError(f"no step for {PATIENCE_S:g} s after step {done}\n{trainer.last_words()}")
            time.sleep(0.05)
        return self.steps_logged() >= step

    def wait_for(self, condition: Callable[[], bool], what: str, process: Process) -> None:
        """Raises SoakError if it does not come to be in time, or if `process` ends."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if process.popen.poll() is not None and not condition():
                raise SoakError(f"{process.kind} ended with {process.popen.returncode}: waited for {what}\n"
                                f"{process.last_words()}")  # fmt: skip
            if ABANDONED.is_set() or time.monotonic() > end:
                raise SoakError(f"waited {PATIENCE_S:g} s for {what}\n{process.last_words()}")
            time.sleep(0.05)

    # ---- its disk

    @property
    def _filler(self) -> Path:
        return self.disk / "filler"

    def fill_disk(self, leave_bytes: int) -> None:
        """By a file that takes all of it but so many bytes."""
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while (left := shutil.disk_usage(self.disk).free - leave_bytes) > 0:
                file.write(bytes(min(left, 1 << 20)))

    def free_disk(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder that can be filled, and what it is: a small tmpfs where this user may mount one. Else no fault fills it:
    a limit on the size of files would be another fault."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    is_small = mounted.returncode == 0
    try:
        yield disk, f"tmpfs of {_DISK_MIB} MiB" if is_small else ""
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def make_world(folder: Path, disk: Path, *, steps: int, seed: int) -> World:
    """Models, data and config of a run whose steps take a tenth of a second; its servers are not started."""
    world = World(folder, disk, steps, seed)
    for name, layers in (("student", 1), ("teacher", 2)):
        random_model.save_model(folder / name, layers, hidden=64, vocabulary=259)
    rows = [{"prompt": f"{i} " + "x" * (i % 9), "completion": "y" * (1 + i % 5)} for i in range(_ROWS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def write_config(world: World) -> None:
    """Once the servers have their ports."""
    served = {"placement": "served", "timeout_s": TIMEOUT_S, "retry_s": RETRY_S}
    addresses = {kind: [f"http://127.0.0.1:{port}"] for kind, port in world.ports.items()}
    config: dict[str, Any] = {
        "run": {"name": "soak", "dir": str(world.run.path), "steps": world.steps, "seed": world.seed,
                "save_every": SAVE_EVERY},
        "teacher": {"model": str(world.folder / "teacher"), "dtype": "float32", "addresses": addresses["teacher"],
                    "cache_gib": 0.001, **served},
        "student": {"model": str(world.folder / "student"), "dtype": "float32"},
        "data": {"train": str(world.folder / "data.jsonl"), "max_prompt_tokens": 32},
        "rollout": {"addresses": addresses["sampler"], "max_new_tokens": 4, **served},
        "mixture": {"student": 0.75, "dataset": 0.25},
        "optim": {"lr": 1e-3, "batch_size": 2, "micro_batch_size": 2},
        "log": {"show_first_batch": False},
    }  # fmt: skip
    (world.folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def announce(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S', time.gmtime())}  {text}")
