"""Runs one job: reads JOB.json, calls the module of its role, and writes what that returns."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path

from gkd.environment import prepare_process

prepare_process()  # the same thread settings for every contender; before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .job import Job, write_json  # noqa: E402


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    result = importlib.import_module(f"contenders.{job.role}").run(job)
    high_water_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(job.result), {**result, "high_water_bytes": high_water_bytes})


if __name__ == "__main__":
    main()
