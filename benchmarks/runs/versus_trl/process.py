"""One job: python -m benchmarks.runs.versus_trl.process JOB.json

Calls the module of its role, and writes what that returns.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.runs.versus_trl.job import Job
from gkd.files import write_json


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    result = importlib.import_module(f"benchmarks.runs.versus_trl.{job.role}").run(job)
    high_water_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(job.result), {**result, "high_water_bytes": high_water_bytes})


if __name__ == "__main__":
    main()
