"""The full fuzz: PYTHONPATH=tests python -m fuzz [--seed N] [--out FILE]; exit status 1 if anything was found.

The figures of the last one are in benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from fuzz.trial import TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", choices=TRIALS)
    options = parser.parse_args()
    results, found = {}, 0
    for name, (trial, full, _) in TRIALS.items():
        if options.only not in (None, name):
            continue
        started = time.process_time()
        outcome = trial(options.seed, full)
        results[name] = {
            "inputs": full,
            **dict.fromkeys(("taken", "refused", "faults"), 0),
            **outcome.counts,
            "longest_s": round(outcome.longest_s, 3),
            "processor_s": round(time.process_time() - started, 1),
        }
        found += len(outcome.faults)
        print(name, results[name], flush=True)
        print(*outcome.faults[:10], sep="\n\n", file=sys.stderr, flush=True)
    if options.out is not None:
        libraries = {
            name: version(name) for name in ("pyarrow", "pydantic", "PyYAML", "starlette", "torch", "safetensors")
        }
        record = {
            "command": f"PYTHONPATH=tests python -m fuzz --seed {options.seed}",
            "device": platform.machine(),
            "versions": {"python": platform.python_version(), **libraries},
            "results": results,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(found > 0)


main()
