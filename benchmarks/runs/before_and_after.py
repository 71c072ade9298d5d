"""Whether a change left the numbers and the speed of a run as they were, against a commit before it:

    python -m benchmarks.runs.before_and_after COMMIT [--pairs 20] [--out benchmarks/results/before_and_after_cpu.json]

Both trees are built side by side on this machine. For each divergence and dtype, both distil a small random model in a
few steps, with the transformers sampler, which is deterministic: losses and weights are compared bit by bit. Then they
take turns, in a new order each time, and the step's time of each pair is compared. The bound is the upper end of the
95 % interval of the median ratio, from the ratios' order: it assumes nothing of their distribution.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, ROOT, command, rounded, say
from benchmarks.runs.random_model import TEXT, save_model
from gkd.files import write_json

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")
TREES = ("before", "after")
LIMIT_S = 600


def main() -> None:
    options = arguments()
    warn_if_busy()
    trees = {"before": checked_out(options.commit, options.work / "tree"), "after": ROOT}
    for tree in trees.values():
        build_kernels(tree)
    models = write_inputs(options.work)
    compared = {}
    for kind in options.kinds:
        for dtype in ("float32", "bfloat16"):
            found = [distilled(options, trees[tree], tree, models, kind, dtype) for tree in TREES]
            compared[f"{kind} {dtype}"] = {
                "losses_equal": found[0]["losses"] == found[1]["losses"],
                "weights_equal": found[0]["weights"] == found[1]["weights"],
                "losses": found[1]["losses"],
            }
            say(f"{kind} {dtype}: losses {compared[f'{kind} {dtype}']['losses_equal']}, "
                f"weights {compared[f'{kind} {dtype}']['weights_equal']}")  # fmt: skip
    record = {
        "command": command(),
        **environment("cpu"),
        "before": resolved(options.commit),
        "steps": options.steps,
        "compared": compared,
        "all_equal": all(one["losses_equal"] and one["weights_equal"] for one in compared.values()),
        "speed": step_ratios(options, trees, models),
    }
    write_json(options.out, record)
    say(json.dumps(record["speed"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what is compared with the tree that this is started in")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=20, help="of timed runs; 0 = numbers alone")
    parser.add_argument("--work", type=Path, default=Path("runs/before_and_after"))
    parser.add_argument("--out", type=Path, default=RESULTS / "before_and_after_cpu.json")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def resolved(commit: str) -> str:
    return subprocess.run(
        ["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def checked_out(commit: str, folder: Path) -> Path:
    """The commit's tree, without its history."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", resolved(commit)], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def build_kernels(tree: Path) -> None:
    say(f"building the kernels of {tree}")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, env={**os.environ, "GKD_BUILD_CUDA": "0"}, check=True, stdout=subprocess.DEVNULL)


def write_inputs(work: Path) -> dict[str, str]:
    """A teacher, a student and a data file with completions."""
    models = {
        "teacher": str(save_model(work / "teacher", layers=4, hidden=256, vocabulary=8192)),
        "student": str(save_model(work / "student", layers=2, hidden=256, vocabulary=8192)),
        "train": str(work / "train.jsonl"),
    }
    rows = [{"prompt": TEXT[i % 7 :], "completion": TEXT[: 5 + i % 17]} for i in range(64)]
    Path(models["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models


def distilled(
    options: argparse.Namespace, tree: Path, name: str, models: dict[str, str], kind: str, dtype: str
) -> dict[str, Any]:
    """Losses, weights as bytes, and the seconds of each step."""
    folder = options.work / "runs" / f"{kind}-{dtype}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    config = {
        "run": {"name": folder.name, "dir": str(folder), "steps": options.steps, "seed": 5},
        "teacher": {"model": models["teacher"], "dtype": dtype},
        "student": {"model": models["student"], "dtype": dtype},
        "data": {"train": models["train"], "max_prompt_tokens": 128},
        "rollout": {"engine": "transformers", "max_new_tokens": 24},
        "mixture": {"student": 0.6, "dataset": 0.4},
        "objective": {"kind": kind, "beta": 0.3, "temperature": 1.5 if dtype == "float32" else 1.0},
        "optim": {"lr": 1e-3, "batch_size": 16, "micro_batch_size": 8},
        "log": {"show_first_batch": False},
    }
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))  # JSON is YAML
    own = {**os.environ, "PYTHONPATH": str(tree), "GKD_CACHE": str(options.work / f"cache-{name}")}
    subprocess.run(
        [sys.executable, "-m", "gkd", "train", path],
        cwd=tree,
        env=own,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=LIMIT_S,
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [record["loss"] for record in records],
        "weights": (folder / "final" / "model.safetensors").read_bytes(),
        "train_s": [record["time/forward_backward_s"] + record["time/optimizer_s"] for record in records],
    }


def step_ratios(options: argparse.Namespace, trees: dict[str, Path], models: dict[str, str]) -> dict[str, Any]:
    """Of the training half of a step, its fastest in a run, after by before; sampling is no part of the objective."""
    ratios: list[float] = []
    seconds: dict[str, list[float]] = {tree: [] for tree in TREES}
    for pair in range(options.pairs):
        taken = {}
        for tree in random.Random(pair).sample(TREES, 2):
            found = distilled(options, trees[tree], tree, models, "jsd", "bfloat16")
            taken[tree] = min(found["train_s"][1:])
            seconds[tree].append(taken[tree])
        ratios.append(taken["after"] / taken["before"])
        say(f"pair {pair + 1}/{options.pairs}: {ratios[-1]:.3f}")
    if not ratios:
        return {}
    return {
        "pairs": len(ratios),
        "ratio": rounded(statistics.median(ratios)),
        "upper_95": rounded(upper_bound_of_median(ratios)),
        **{f"{tree}_s": rounded(statistics.median(seconds[tree])) for tree in TREES},
    }


def upper_bound_of_median(values: list[float]) -> float:
    """The smallest order statistic that is above the median with a probability of at least 0.975 (sign test)."""
    ordered, n = sorted(values), len(values)
    below = 0.0
    for rank in range(n):
        below += math.comb(n, rank) / 2**n
        if below >= 0.975:
            return ordered[rank]
    return ordered[-1]


if __name__ == "__main__":
    main()
