"""Starts a job as a process of its own, keeps its output, and watches the memory of its process tree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.records import ROOT, read_json
from benchmarks.runs.versus_trl.job import Job
from gkd.environment import without_launcher
from gkd.files import write_json

SAMPLE_S = 0.1


class JobError(Exception):
    """A job that failed; the message is the last line of its log."""

    def __init__(self, last_line: str, log: Path) -> None:
        super().__init__(last_line)
        self.log = log


def launched(job: Job) -> dict[str, Any]:
    """The job's result with `wall_s` and `peak_rss_bytes`; the one on disk, if this very job was done before.

    `peak_rss_bytes` is the largest sum of resident sets over the process tree, sampled, or the process's own
    high-water mark where that is more. Raises JobError.
    """
    result = Path(job.result)
    if is_done(job):
        return read_json(result)
    log, own = result.with_suffix(".log"), own_result(job)
    result.unlink(missing_ok=True)
    own.unlink(missing_ok=True)
    description = description_of(job)
    replace(job, result=str(own)).write(description)
    start_s = time.perf_counter()
    with log.open("w") as output:
        command = [sys.executable, "-m", "benchmarks.runs.versus_trl.process", str(description)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = without_launcher() | {"PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            peak_bytes = watched(process)
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()
    if process.returncode != 0 or not own.exists():
        raise JobError(last_line(log), log)
    values = read_json(own)
    values["wall_s"] = time.perf_counter() - start_s
    values["peak_rss_bytes"] = max(peak_bytes, values.pop("high_water_bytes"))
    write_json(result, values)
    own.unlink()
    return values


def own_result(job: Job) -> Path:
    """What the process itself writes: it lacks its memory, and so is no result yet."""
    return Path(job.result).with_suffix(".own.json")


def description_of(job: Job) -> Path:
    return Path(job.result).with_suffix(".job.json")


def is_done(job: Job) -> bool:
    description = description_of(job)
    if not (Path(job.result).exists() and description.exists()):
        return False
    return Job.read(description) == replace(job, result=str(own_result(job)))


def watched(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end; the peak of the tree's resident bytes."""
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, tree_bytes(process.pid))
        time.sleep(SAMPLE_S)
    return peak_bytes


def tree_bytes(pid: int) -> int:
    try:
        root = psutil.Process(pid)
        return sum(resident_bytes(process) for process in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
