"""The figures that README and docs state, and whether they hold: python -m benchmarks.figures.claims [--now FOLDER]

Each is compared with the file of benchmarks/results that it comes from, to the last digit that the page shows. With
--now also with new results, such as build/evidence/results of `make evidence`, within the margin that stands here:
exact facts (bytes, errors against float64) get a tight one, times of another machine, another hour and a smaller size
a wide one. The exit status is 1 if a figure does not hold.

A new figure in the README is a new claim here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Set
from pathlib import Path

from benchmarks.figures.judging import Again, Claim, Figure, Verdict, column, disagreements, judged, of, over, table
from benchmarks.figures.sections.losses import logits_bytes
from benchmarks.figures.sections.overlap import speedup
from benchmarks.figures.sections.reading import BOTH, read
from benchmarks.figures.sections.versus_trl import equal_precision_step_s
from benchmarks.figures.table_claims import TABLE_CLAIMS
from benchmarks.records import RESULTS, ROOT

README, BENCHMARKS, TOUR = ("README.md",), ("docs/benchmarks.md",), ("docs/index.md",)
BOTH_PAGES = (*README, *BENCHMARKS)
RELIABILITY = ("docs/reliability.md",)
SERVING, RECIPES = ("docs/serving.md",), ("docs/recipes.md",)
QUICKSTART, VERSUS_TRL, PACKING = "quickstart.json", "versus_trl_cpu.json", "packing_cpu.json"
DIVERGENCE, LINEAR, SCORING = "divergence_cpu.csv", "linear_divergence_cpu.csv", "teacher_scoring_cpu.json"
AUTHOR, AUTHOR_PAGE = "author_cpu.json", ("docs/author.md",)
OVERLAP, CUT, FOUR_BITS = "overlap_cpu.json", "cut_cpu.json", "four_bits_cpu.json"
NO_BOUND = float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the committed ones")
    parser.add_argument("--now", type=Path, metavar="FOLDER", help="new results to hold them against")
    options = parser.parse_args()
    wrong = stale(options.root, options.results)
    if options.now:
        verdicts = compared(options.results, options.now, {claim.again.run for claim in CLAIMS if claim.again})
        print(table(verdicts))
        wrong += [str(verdict) for verdict in verdicts if verdict.holds is False]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(CLAIMS)} figures of README and docs are those of {options.results}")


def stale(root: Path, results: Path) -> list[str]:
    """What pages state and their results do not, one line each."""
    return [line for claim in CLAIMS for line in disagreements(claim, root, results)]


def compared(committed: Path, fresh: Path, runs: Set[str]) -> list[Verdict]:
    """Every claim against fresh results; `runs` are those that were asked for."""
    return [judged(claim, committed, fresh, runs) for claim in CLAIMS]


# ---- figures that are more than a number in a file


def heldout(name: str, when: str) -> Figure:
    return of(QUICKSTART, "summary", f"heldout_{name}_{when}")


def load_evaluate_save_s(path: Path) -> float:
    summary = json.loads(path.read_text())["summary"]
    return summary["wall_s"] - summary["time/step_s"]


def memory_in_logits(path: Path) -> float:
    """The most memory that gkd takes beyond its inputs, in units of one side's logits."""
    rows = read(path.parent, path.stem).get(path.stem)
    if rows is None:
        raise FileNotFoundError(path)
    ours = [row for row in rows if row["implementation"] == "gkd" and row["work"] == BOTH]
    return max(float(row["peak_extra_mb"]) * 1e6 / logits_bytes(row) for row in ours)


def equal_precision_speedup(path: Path) -> float:
    ours_s, theirs_s = equal_precision_step_s(json.loads(path.read_text()))
    return theirs_s / ours_s


def scored(way: str, key: str) -> Figure:
    return of(SCORING, "methods", way, key)


def bytes_over_hidden_size(path: Path) -> float:
    smollm2_hidden = 576
    return scored("hidden states", "bytes_a_token").read(path) / smollm2_hidden


def overlap_speedup(on_policy: str) -> Callable[[Path], float]:
    return lambda path: speedup(json.loads(path.read_text())["arms"], on_policy)


# ---- the claims

SAME_START = Again("quickstart", 0.95, 1.05, "the same student, prompts and teacher's answers")
FASTER = Again("divergence", 0.5, NO_BOUND, "another machine, one shape, few rounds")
LINEAR_FASTER = Again("linear_divergence", 0.5, NO_BOUND, "another machine, a quarter of the rows, few rounds")
STILL_FASTER = Again("versus_trl", 0.66, NO_BOUND, "TRL untuned, 3 short steps", floor=1.0)
SAME_BYTES = Again("teacher_scoring", 0.98, 1.02, "shorter or longer numbers in HTTP and JSON")

QUICKSTART_CLAIMS = [
    claim
    for name, label, most in (("forward_kl", "forward KL", 1.8), ("reverse_kl", "reverse KL", 1.8), ("jsd", "JSD", 1.5))
    for claim in (
        Claim(
            f"quickstart: {label} before", rf"{label} +([\d.]+) +[\d.]+ +[\d.]+ %", heldout(name, "before"), SAME_START
        ),
        Claim(f"quickstart: {label} after", rf"{label} +[\d.]+ +([\d.]+) +[\d.]+ %", heldout(name, "after")),
        Claim(
            f"quickstart: {label} left, %",
            rf"{label} +[\d.]+ +[\d.]+ +([\d.]+) %",
            over(heldout(name, "after"), heldout(name, "before"), scale=100.0),
            Again("quickstart", 0.0, most, "10 steps instead of 24"),
        ),
    )
]
QUICKSTART_TIMES = [
    Claim(f"quickstart: {key}", says, of(QUICKSTART, "summary", key), pages=TOUR if key.startswith("time/") else README)
    for key, says in (
        ("steps", r"(\d+) steps in \d+m"),
        ("wall_s", r"steps in (\d+m\d+s)"),
        ("loss_first", r"loss  (\S+) "),
        ("loss_last", r"loss  \S+ \S+ (\S+)"),
        ("time/sample_s", r"sample +(\S+s) "),
        ("time/score_s", r"score +(\S+s) "),
        ("time/forward_backward_s", r"forward, backward +(\S+s) "),
        ("time/optimizer_s", r"optimizer +(\S+s) "),
        ("time/sync_s", r"sync weights +(\S+s) "),
        ("time/other_s", r"rest of the steps +(\S+s) "),
    )
] + [Claim("quickstart: rest", r"load, evaluate, save +(\S+s) ", Figure(QUICKSTART, load_evaluate_save_s), pages=TOUR)]

SOAK_CLAIMS = [
    Claim(f"soak: {'/'.join(keys)}", says, of("soak.json", *keys), pages=RELIABILITY)
    for keys, says in (
        (("steps",), r"is of (\d+) steps"),
        (("disturbed", "resumes"), r"(\d+) resumes"),
        (("disturbed", "steps_lost"), r"did (\d+) steps again"),
        (("disturbed", "most_steps_lost"), r"at most (\d+) at once"),
    )
]

CUT_CLAIMS = [
    Claim(
        f"cut by {rule}: forward KL before training",
        rf"\| {rule} \| ([\d.]+) \|",
        of(CUT, "rules", rule, "heldout/forward_kl"),
        Again("cut", 0.95, 1.05, "the teacher's answers are sampled by another build"),
        RECIPES,
    )
    for rule in ("even", "block_influence", "divergence")
] + [
    Claim(
        "cut by divergence: processor seconds",
        r"\| divergence \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|",
        of(CUT, "rules", "divergence", "processor_seconds"),
        Again("cut", 0.0, 3.0, "another machine, another hour"),
        RECIPES,
    ),
    Claim(
        "cut by divergence: processor seconds with AVX2 alone",
        r"\| divergence \| – \| – \| – \| \d+ \| ([\d.]+) \|",
        of("cut_cpu_avx2.json", "rules", "divergence", "processor_seconds"),
        pages=RECIPES,
    ),
]

LOSS_CLAIMS = [
    *(
        Claim(
            f"divergence: {peer}, least × gkd's time",
            rf"\| {peer} \| ([\d.]+) to [\d.]+ \|",
            column(DIVERGENCE, "ratio_to_gkd", min, implementation=peer),
            FASTER,
            BENCHMARKS,
        )
        for peer in ("eager", "eager_fp32", "compiled", "compiled_fp32")
    ),
    Claim(
        "divergence: gkd's extra memory, × logits",
        r"1 to 1 \| ([\d.]+) \|",
        Figure(DIVERGENCE, memory_in_logits),
        Again("divergence", 0.0, 1.3, "the allocator's holes"),
        BENCHMARKS,
    ),
    Claim(
        "divergence: gkd's value error",
        r"1 to 1 \| [\d.]+ \| (\S+) \|",
        column(DIVERGENCE, "value_error", max, implementation="gkd"),
        Again("divergence", 0.0, 10.0, "float32's rounding; one shape"),
        BENCHMARKS,
    ),
    Claim(
        "divergence: gkd's gradient error",
        r"1 to 1 \| [\d.]+ \| \S+ \| (\S+) \|",
        column(DIVERGENCE, "gradient_error", max, implementation="gkd"),
        Again("divergence", 0.0, 1.5, "one rounding to bfloat16"),
        BENCHMARKS,
    ),
    *(
        Claim(
            f"linear: {peer}, × gkd's time",
            rf"\| {peer} \| \S+ \| \S+ – \S+ \| ([\d.]+) \|",
            column(LINEAR, "ratio_to_gkd", min, implementation=peer),
            LINEAR_FASTER,
            BENCHMARKS,
        )
        for peer in ("torch_plain", "trl_chunked", "liger_chunked")
    ),
    Claim(
        "linear: gkd's gradient error",
        r"→ [^|]*\*\*\n\n.*\n.*\n\| gkd \|.*\| (\S+) \|  \|",
        column(LINEAR, "gradient_error", max, implementation="gkd"),
        Again("linear_divergence", 0.0, 1.5, "one rounding to bfloat16"),
        BENCHMARKS,
    ),
]

WHOLE_RUN_CLAIMS = [
    Claim(
        "versus TRL: speed-up",
        r"takes ([\d.]+) times as long a step",
        of(VERSUS_TRL, "speedup_vs_fastest_trl"),
        pages=BOTH_PAGES,  # the small run tries no settings: it tells of equal precision
    ),
    Claim(
        "versus TRL: speed-up at equal precision",
        r"DistillationTrainer takes ([\d.]+) times gkd's seconds",
        Figure(VERSUS_TRL, equal_precision_speedup),
        STILL_FASTER,
        BENCHMARKS,
    ),
    Claim(
        "versus TRL: memory",
        r"needs ([\d.]+)\s+times its memory",
        of(VERSUS_TRL, "memory_vs_fastest_trl"),
        Again("versus_trl", 0.0, 1.5, "a smaller batch beside the same libraries"),
        BOTH_PAGES,
    ),
    Claim(
        "versus TRL: gkd's held-out JSD",
        r"\| gkd \| .* \(.*\).*\| ([\d.]+) \([^|]*\) \| [\d.]+ \([^|]*\) \|",
        of(VERSUS_TRL, "contenders", "gkd", "over_rounds", "heldout/jsd", "median"),
        Again("versus_trl", 0.8, 1.2, "4 steps of 8 prompts instead of 6 of 16"),
        BENCHMARKS,
    ),
    Claim(
        "packing: speed-up",
        r"Packed is ([\d.]+) times as fast",
        of(PACKING, "ways", "packed", "speedup"),
        Again("packing", 0.75, NO_BOUND, "half the batch, shorter, few rounds", floor=1.0),
        BENCHMARKS,
    ),
    Claim(
        "compiled layers: speed-up",
        r"compiled layers ([\d.]+) times",
        of(PACKING, "ways", "compiled", "speedup"),
        Again("packing", 0.75, NO_BOUND, "half the batch, shorter, few rounds", floor=1.0),
        BENCHMARKS,
    ),
    Claim(
        "packing: difference of gradients",
        r"\| packed \|.*\| (\S+) \|\n",
        of(PACKING, "ways", "packed", "gradient_difference_float32"),
        Again("packing", 0.0, 3.0, "float32's rounding; half the batch"),
        BENCHMARKS,
    ),
]

SERVING_CLAIMS = [
    Claim(
        "served teacher: bytes a token ÷ H",
        r"(\d) H bytes a scored token counted on the socket",
        Figure(SCORING, bytes_over_hidden_size),
        SAME_BYTES,
        SERVING,
    ),
    Claim(
        "served teacher: bytes, 128 log-probabilities ÷ hidden states",
        r"\| prompt_logprobs=128 \|.*\| ([\d,.]+) × \|",
        over(scored("prompt_logprobs=128", "bytes_a_token"), scored("hidden states", "bytes_a_token")),
        SAME_BYTES,
        SERVING,
    ),
    Claim(
        "served teacher: bytes, whole vocabulary ÷ hidden states",
        r"\| whole vocabulary .*\| ([\d,.]+) × \|",
        over(scored("whole vocabulary", "bytes_a_token"), scored("hidden states", "bytes_a_token")),
        SAME_BYTES,
        SERVING,
    ),
    Claim(
        "served teacher: time, 128 log-probabilities ÷ hidden states",
        r"\| prompt_logprobs=128 \|.*\| ([\d,.]+) × \| [\d,.]+ × \|",
        over(scored("prompt_logprobs=128", "median_s_of_the_work"), scored("hidden states", "median_s_of_the_work")),
        Again("teacher_scoring", 0.4, NO_BOUND, "another machine, a quarter of the sequences, few passes"),
        SERVING,
    ),
]

OVERLAP_CLAIMS = [
    Claim(
        f"sampling ahead: {name}, × fewer seconds",
        says,
        Figure(OVERLAP, overlap_speedup(cores)),
        Again("overlap", 0.66, NO_BOUND, "5 steps, one round", floor=1.0),
        SERVING,
    )
    for name, cores, says in (
        ("the same cores", "half of the cores each", r"ahead takes ([\d.]+) times fewer"),
        ("all cores", "all cores for both", r"and ([\d.]+) times fewer than taking turns with all"),
    )
]

STILL_BESIDE_HTTPX = Again("author", 0.3, NO_BOUND, "other work on the machine", floor=0.7)
AUTHOR_CLAIMS = [
    Claim(f"gkd author: {key}", says, of(AUTHOR, "medians", key), again, AUTHOR_PAGE)
    for key, says, again in (
        (
            "rows_per_processor_s",
            r"([\d,]+) rows a processor second",
            Again("author", 0.3, NO_BOUND, "another machine, fewer rows", floor=500.0),
        ),
        ("resident_mib_after_1000_rows", r"([\d.]+) MiB after 1,000 rows", None),
        (
            "largest_change_after_percent",
            r"changes by ([\d.]+) %",
            Again("author", 0.0, 3.0, "fewer rows; 5 % are the limit"),
        ),
        ("rows_per_s", r"made (\d+) rows a second", None),
        ("httpx_requests_per_s", r"httpx alone (\d+) requests", None),
        ("share_of_httpx", r"median of ([\d.]+) rows a request", STILL_BESIDE_HTTPX),
        ("share_of_httpx_by_processor_time", r"and of ([\d.]+) by processor time", STILL_BESIDE_HTTPX),
    )
]

FOUR_BITS_CLAIMS = [
    Claim(f"four bits: {' '.join(keys)}", says, of(FOUR_BITS, *keys), pages=("docs/quantization.md",))
    for keys, says in (
        (("forward_kl_means", "full"), r"F, full \| ([\d.]+) \|"),
        (("forward_kl_means", "rounded"), r"R, the same rounded \| ([\d.]+) \|"),
        (("forward_kl_means", "trained for it"), r"Q, trained for four bits \| ([\d.]+) \|"),
        (("left_over_mean",), r"([\d.]+) of the loss by rounding is left"),
        (("weights_mb", "trained for it"), r"([\d.]+) MB of packed weights"),
        (("weights_mb", "full"), r"beside ([\d.]+) in bfloat16"),
    )
]

CLAIMS = [
    *QUICKSTART_CLAIMS,
    *QUICKSTART_TIMES,
    *CUT_CLAIMS,
    *SOAK_CLAIMS,
    *LOSS_CLAIMS,
    *WHOLE_RUN_CLAIMS,
    *SERVING_CLAIMS,
    *OVERLAP_CLAIMS,
    *AUTHOR_CLAIMS,
    *FOUR_BITS_CLAIMS,
    *TABLE_CLAIMS,
]

if __name__ == "__main__":
    main()
