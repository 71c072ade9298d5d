"""What a student loses by being rounded to four bits, and how much of it training for four bits wins back.

python -m benchmarks.runs.four_bits [--seeds 3] [--steps 36] [--folder runs/four_bits] [--out four_bits_cpu.json]

The quickstart's student is trained twice from the same start, with the same texts and as many steps: as it is, and with
student.quantize (configs/four_bits.yaml). Three students are measured by `gkd eval`, on what lies in their folders:

    F   the full one       R   the same, rounded by `gkd export`       Q   the one that was trained for it

(Q - F) / (R - F) is what is left of the loss by rounding: 1 where training for four bits wins back nothing. A seed that
is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import OK, ended
from benchmarks.records import RESULTS, command, read_json, rounded, say
from gkd.bench.machine import measured_with

FULL, ROUNDED, TRAINED = "full", "rounded", "trained for it"
_FIGURES = ("forward_kl", "reverse_kl")
_LIMIT_S = 7200.0


def gkd(log: Path, *words: str | Path) -> None:
    """One command; its output goes on in `log`."""
    with log.open("a", encoding="utf-8") as file:
        how = ended([sys.executable, "-m", "gkd", *words], file, _LIMIT_S)
    if how != OK:
        sys.exit(f"gkd {words[0]} {how}: see {log}")


def one_seed(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and measures all three."""
    folder.mkdir(parents=True, exist_ok=True)
    log, every = folder / "log.txt", max(1, steps // 4)
    runs = {FULL: (folder / "full", "quickstart"), TRAINED: (folder / "trained", "four_bits")}
    for run, config in runs.values():
        said = [f"run.dir={run}", f"run.seed={seed}", f"run.steps={steps}", f"eval.every={every}", "--overwrite"]
        say(f"seed {seed}: configs/{config}.yaml")
        gkd(log, "train", f"configs/{config}.yaml", *said)
    packed = folder / "rounded"
    shutil.rmtree(packed, ignore_errors=True)
    gkd(log, "export", runs[FULL][0], "--out", packed, "--format", "compressed-tensors", "--scheme", "int4")
    students = {FULL: runs[FULL][0] / "final", ROUNDED: packed, TRAINED: runs[TRAINED][0] / "final"}
    found: dict[str, Any] = {"seed": seed, "students": {}}
    for name, student in students.items():
        figures = measured(runs[FULL][0], student, folder, log)
        size_bytes = sum(file.stat().st_size for file in student.glob("*.safetensors"))
        found["students"][name] = {**figures, "weights_bytes": size_bytes}
        say(f"seed {seed}, {name}: forward KL {figures['forward_kl']:.4f}, {size_bytes / 1e6:.1f} MB")
    found["curves"] = {name: curve(run) for name, (run, _) in runs.items()}
    return found


def measured(run: Path, student: Path, folder: Path, log: Path) -> dict[str, float]:
    """Held-out divergences, nats a token."""
    out = folder / "eval"
    gkd(log, "eval", run / "config.resolved.json", "--student", student, "--only", "task", "--out", out)
    rows = read_json(out / "eval.json")["task"]["figures"]
    return {name: rows[name]["student_after"]["value"] for name in _FIGURES}


def curve(run: Path) -> list[dict[str, float]]:
    """Held-out forward KL over scored tokens, as the run measured it: of the student that it deploys."""
    summary = read_json(run / "summary.json")
    points, tokens = [{"tokens": 0.0, "forward_kl": summary["heldout_forward_kl_before"]}], 0.0
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        tokens += record["tokens/scored"]
        if "heldout/forward_kl" in record:
            points.append({"tokens": tokens, "forward_kl": record["heldout/forward_kl"]})
    return [*points, {"tokens": tokens, "forward_kl": summary["heldout_forward_kl_after"]}]


def left_over(seed: dict[str, Any]) -> float:
    """(Q - F) / (R - F)."""
    full, round_, trained = (seed["students"][name]["forward_kl"] for name in (FULL, ROUNDED, TRAINED))
    return (trained - full) / (round_ - full)


def mean_of(seeds: list[dict[str, Any]], student: str, figure: str) -> float:
    return statistics.fmean(seed["students"][student][figure] for seed in seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--folder", type=Path, default=Path("runs/four_bits"))
    parser.add_argument("--out", type=Path, default=RESULTS / "four_bits_cpu.json")
    options = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        kept = options.folder / f"seed_{seed}" / "found.json"
        if not kept.exists():
            started_s = time.perf_counter()
            found = one_seed(seed, options.steps, kept.parent.absolute())
            kept.write_text(json.dumps(found | {"wall_s": rounded(time.perf_counter() - started_s)}), encoding="utf-8")
        seeds.append(read_json(kept))
        shares = [left_over(one) for one in seeds]
        record = {
            "command": command(),
            **measured_with(),
            "steps": options.steps,
            "seeds": seeds,
            "left_over": [rounded(share) for share in shares],
            "left_over_mean": rounded(statistics.fmean(shares)),
            "forward_kl_means": {name: mean_of(seeds, name, "forward_kl") for name in (FULL, ROUNDED, TRAINED)},
            "weights_mb": {name: mean_of(seeds, name, "weights_bytes") / 1e6 for name in (FULL, ROUNDED, TRAINED)},
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        say(f"left of the loss by rounding: {', '.join(f'{share:.3f}' for share in shares)}")


if __name__ == "__main__":
    main()
