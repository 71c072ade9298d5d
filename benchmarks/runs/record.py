"""Keeps the outcome of a run with what it ran on: python -m benchmarks.runs.record RUN_FOLDER OUT.json"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.records import read_json
from gkd.bench.machine import device
from gkd.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder")
    parser.add_argument("out", type=Path, help="JSON")
    options = parser.parse_args()
    environment = read_json(options.run / "environment.json")
    program, *arguments = environment["command"]
    record = {
        "command": " ".join([Path(program).name, *arguments]),
        "device": device(),
        "git_revision": environment["git_revision"],
        "python": environment["python"],
        "packages": environment["packages"],
        "summary": read_json(options.run / "summary.json"),
    }
    write_json(options.out, record)


if __name__ == "__main__":
    main()
