"""Builds, tests, sanitizes and times the CUDA kernels on this machine's GPU: make gpu-check [WHEELS=dir] [OUT=dir]

Needs torch, numpy, pytest and nvcc, no network, and neither vLLM nor DeepSpeed. WHEELS is a folder of wheels of peers
(trl, liger-kernel) to measure against; those that are missing are named. Every step is a process with a limit of its
own, so that one that fails or hangs costs nothing but its own result, and the whole ends within about 8 minutes. Left
in OUT (default benchmarks/results): gpu_check.json, the benchmarks' CSVs, end_to_end_cuda.json (20 steps of the real
loop, where transformers and gkd's own requirements are installed), and the log of each step.

The exit status is 1 if a step failed that had to work (build, tests, sanitizers, benchmarks); figures below a bar are
printed and recorded, not an error.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import OK, ended
from benchmarks.records import RESULTS, ROOT, say
from gkd.files import write_json

PEERS = ROOT / "build" / "peers"
JOB = ["tests/gpu/small_job.py"]
DIVERGENCE, LINEAR = "divergence_cuda.csv", "linear_divergence_cuda.csv"


@dataclass(frozen=True)
class Step:
    """A process, how long it may take, and whether the check fails with it."""

    name: str
    command: list[str]
    limit_s: int
    required: bool = True


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # OK, how it failed, or why it could not be tried
    seconds: float
    required: bool


@dataclass(frozen=True)
class Bar:
    """A figure that a row of a CSV has to reach."""

    what: str
    reached: float | None  # None: not measured
    bar: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        return "reached" if (self.reached <= self.bar if self.at_most else self.reached >= self.bar) else "MISSED"


def main() -> int:
    options = arguments()
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = prepare(options.wheels)
    gpu = describe_gpu(environment)
    say(f"{gpu['name']}, compute capability {gpu['capability']}, torch {gpu['torch']}, CUDA {gpu['cuda']}")
    missing = missing_peers(environment)
    if missing:
        say(f"peers that are missing here and will not be measured: {', '.join(missing)} (WHEELS=dir brings them)")
    environment["GKD_CUDA_ARCHS"] = gpu["capability"].replace(".", "")
    for name in (DIVERGENCE, LINEAR):  # an earlier run's are not to be judged
        (out / name).unlink(missing_ok=True)
    outcomes = [run(step, environment, out) for step in steps(out, options.quick)]
    bars = find_bars(out)
    for bar in bars:
        value = "-" if bar.reached is None else f"{bar.reached:.3g}"
        say(f"{bar.verdict:>13}  {value:>6} {'<=' if bar.at_most else '>='} {bar.bar:<5} {bar.what}")
    record = {
        "command": "make gpu-check",
        "gpu": gpu,
        "git_revision": git_revision(),
        "missing_peers": missing,
        "steps": [asdict(outcome) for outcome in outcomes],
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in bars],
    }
    write_json(out / "gpu_check.json", record)
    say(f"record: {out / 'gpu_check.json'}")
    return int(any(outcome.required and outcome.status != OK for outcome in outcomes))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers, unpacked into build/peers")
    parser.add_argument("--quick", action="store_true", help="few rounds and one shape: does it work at all")
    return parser.parse_args()


def prepare(wheels: Path | None) -> dict[str, str]:
    """The environment of all steps. Unpacks the peers' wheels; nothing is installed into this Python."""
    if wheels is not None:
        found = [str(path) for path in sorted(wheels.glob("*.whl"))]
        if not found:
            raise SystemExit(f"gpu-check: no wheels in {wheels}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(PEERS), *found], check=True)
    path = [str(ROOT), str(PEERS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "GKD_BUILD_CUDA": "1"}


def describe_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """Asked in another process: this one must not hold a context while others measure."""
    script = (
        "import json, torch\n"
        "assert torch.cuda.is_available(), 'torch sees no GPU'\n"
        "p = torch.cuda.get_device_properties(0)\n"
        "print(json.dumps({'name': p.name, 'capability': f'{p.major}.{p.minor}', 'memory_bytes': p.total_memory,"
        " 'multiprocessors': p.multi_processor_count, 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SystemExit(f"gpu-check needs a CUDA build of torch and a GPU: {lines[-1] if lines else 'no answer'}")
    return json.loads(done.stdout.splitlines()[-1])


def missing_peers(environment: Mapping[str, str]) -> list[str]:
    script = "import importlib.util as u; print(*(n for n in ('trl', 'liger_kernel', 'triton') if not u.find_spec(n)))"
    done = subprocess.run([sys.executable, "-c", script], env=dict(environment), capture_output=True, text=True)
    return done.stdout.split()


def steps(out: Path, quick: bool) -> list[Step]:
    python = sys.executable
    few = ["--quick"] if quick else []
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    profiler = ["ncu", "--csv", "--clock-control", "none"]
    kernel_metrics = "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum"
    kernel_metrics += (
        ",dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed"
    )
    divergence = [python, "-m", "benchmarks.losses.divergence", "--device", "cuda", "--works", "value+gradient", *few]
    divergence += ["--kinds", "forward_kl", "reverse_kl", "jsd", "--ignored", "0"]
    divergence += ["--shapes", "8192x128256", *([] if quick else ["8192x151936"])]
    linear = [python, "-m", "benchmarks.losses.linear_divergence", "--device", "cuda", "--kinds", "jsd", *few]
    linear += ["--shapes", "1024x4096x4096x128256" if quick else "8192x4096x4096x128256"]
    end_to_end = [python, "-m", "benchmarks.runs.end_to_end", *(["--size", "tiny"] if quick else [])]
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 150),
        Step("tests", [python, "-m", "pytest", "-q", "--confcutdir=tests/gpu", "tests/gpu"], 120),
        Step("memcheck", [*sanitizer, "memcheck", python, *JOB], 60),
        Step("racecheck", [*sanitizer, "racecheck", python, *JOB], 60),
        Step("divergence", [*divergence, "--out", str(out / DIVERGENCE)], 150),
        Step("linear_divergence", [*linear, "--out", str(out / LINEAR)], 120),
        Step(
            "roofline",
            [*profiler, "--kernel-name", "regex:rows", "--metrics", kernel_metrics, python, *JOB, "--large"],
            60,
            required=False,
        ),
        # not required: transformers, and what gkd's config and monitor stand on, may be missing
        Step("end_to_end", [*end_to_end, "--out", str(out / "end_to_end_cuda.json")], 120, required=False),
    ]


def run(step: Step, environment: Mapping[str, str], out: Path) -> Outcome:
    """Runs a step with its output in a log; kills it and all that it started at its limit."""
    log = out / f"gpu_check_{step.name}.log"
    if shutil.which(step.command[0]) is None:
        say(f"{step.name}: {step.command[0]} is not on this machine")
        return Outcome(step.name, f"{step.command[0]} not found", 0.0, step.required)
    start = time.monotonic()
    with log.open("w") as file:
        status = ended(step.command, file, step.limit_s, environment)
    seconds = time.monotonic() - start
    say(f"{step.name}: {status} after {seconds:.0f} s")
    if status != OK or step.name == "end_to_end":
        for line in log.read_text(errors="replace").splitlines()[-25:]:
            say(f"    {line}")
    return Outcome(step.name, status, round(seconds, 1), step.required)


def find_bars(out: Path) -> list[Bar]:
    """What an H100 has to reach at 8192 rows in bfloat16."""
    bars = []
    logits = rows_of(out / DIVERGENCE)
    for vocab in ("128256", "151936"):
        for kind in ("forward_kl", "reverse_kl", "jsd"):
            case = {r["implementation"]: r for r in logits if r["vocab"] == vocab and r["kind"] == kind}
            name = f"{kind}, 8192 x {vocab}"
            share = 0.70 if kind == "jsd" else 0.85
            bars.append(Bar(f"{name}: share of the copy rate", figure(case, "gkd", "copy_share"), share))
            if kind != "jsd":
                bars.append(Bar(f"{name}: torch.compile's time", figure(case, "compiled_fp32", "ratio_to_gkd"), 2.0))
                bars.append(Bar(f"{name}: Liger's time from logits", figure(case, "liger_jsd", "ratio_to_gkd"), 5.0))
    case = {row["implementation"]: row for row in rows_of(out / LINEAR)}
    name = "linear jsd, 8192 x 4096 -> 128256"
    bars.append(Bar(f"{name}: time of its bare products", figure(case, "gkd", "ratio_to_gemms"), 1.15, at_most=True))
    bars.append(Bar(f"{name}: TRL's time", figure(case, "trl_chunked", "ratio_to_gkd"), 1.5))
    return bars


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a result, the cases of as many rows as the bars are for; a quick run has none of some."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["rows"] == "8192"]


def figure(case: Mapping[str, Mapping[str, str]], implementation: str, column: str) -> float | None:
    text = case.get(implementation, {}).get(column, "")
    return float(text) if text else None


def git_revision() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
