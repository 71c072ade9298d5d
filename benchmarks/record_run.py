"""Keeps the outcome of a run with what it ran on: python benchmarks/record_run.py RUN_FOLDER OUT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from measure import device


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    environment = json.loads((run / "environment.json").read_text())
    program, *arguments = environment["command"]
    record = {
        "command": " ".join([Path(program).name, *arguments]),
        "device": device(),
        "git_revision": environment["git_revision"],
        "python": environment["python"],
        "packages": environment["packages"],
        "summary": json.loads((run / "summary.json").read_text()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
