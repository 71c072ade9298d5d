"""Whole runs against TRL."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.figures.sections.reading import Record, divergence_name, records
from benchmarks.figures.sections.text import markdown, percent, section, three_digits
from benchmarks.runs.versus_trl import same_seconds
from benchmarks.runs.versus_trl.bench import FLOAT32_WEIGHTS
from benchmarks.runs.versus_trl.show import profile_rows


def versus_trl_section(results: Path) -> str:
    """Where a step's seconds go, tokens, memory and held-out divergence: medians over rounds, one line a contender."""
    parts = []
    for record in records(results, "versus_trl").values():
        work = record["work"]
        name = divergence_name(work)
        rounds = len(record["contenders"]["gkd"]["rounds"])
        size = f"{work['batch_size']} prompts × {work['max_new_tokens']} new tokens a step, {name}"
        measured = f"medians (least – most) of {rounds} rounds of {work['steps']} steps, without the first"
        parts += [
            f"{record['device']}, {record['threads']} threads; {size}; {measured}.  \n{record['versions']}.",
            versus_trl_table(record),
            versus_trl_summary(record),
        ]
        if "same_seconds" in record:
            header, *lines = same_seconds.rows(record["same_seconds"])
            parts.append(markdown(header, lines))
    return section(parts)


def versus_trl_table(record: Record) -> str:
    lines = []
    for name, contender in record["contenders"].items():
        found = contender["over_rounds"]
        parts = [
            three_digits(found[f"{part}_s"]["median"] or None) for part in ("sampling", "scoring", "training", "sync")
        ]
        lines.append(
            [
                name,
                with_range(found["step_s"], three_digits),
                *parts,
                three_digits(found["tokens_per_s"]["median"]),
                three_digits(found["peak_rss_bytes"]["median"] / 2**30),
                with_range(found["heldout/jsd"], "{:.4f}".format),
                with_range(found["heldout/forward_kl"], "{:.3f}".format),
            ]
        )
    before = record["heldout_before"]
    untrained = [f"{before['heldout/jsd']:.4f}", f"{before['heldout/forward_kl']:.3f}"]
    lines.append(["the student before", *["–"] * 7, *untrained])
    header = ["", "s a step", "sampling", "scoring", "training", "weight sync", "tokens/s", "peak GiB"]
    return markdown([*header, "held-out JSD", "held-out KL"], lines)


def with_range(found: Mapping[str, float], form: Callable[[float], str]) -> str:
    """Median (least – most)."""
    return f"{form(found['median'])} ({form(found['least'])} – {form(found['most'])})"


def versus_trl_summary(record: Record) -> str:
    bound = record["bound"]
    rate = statistics.median(bound["bf16_matmul_flops_per_s"]) / 1e12
    speedup, memory = (three_digits(record[f"{name}_vs_fastest_trl"]) for name in ("speedup", "memory"))
    return (
        f"{record['fastest_trl']}, the faster of the two, takes {speedup} times as long a step as gkd, which needs "
        f"{memory} times its memory. Bare bfloat16 products reach {three_digits(rate)} TFLOP/s here; gkd's training "
        f"half, {three_digits(bound['training_flops_a_step'] / 1e12)} TFLOP a step, reaches "
        f"{percent(bound['share_reached'])} of that.{equal_precision(record)}"
    )


def equal_precision(record: Record) -> str:
    """Of TRL with float32 master weights under autocast, which is what gkd keeps."""
    if FLOAT32_WEIGHTS not in record["contenders"]:
        return ""
    ours_s, theirs_s = equal_precision_step_s(record)
    return (
        " TRL's weights are bfloat16 alone, which was its fastest; with float32 master weights, which gkd keeps, "
        f"DistillationTrainer takes {three_digits(theirs_s / ours_s)} times gkd's seconds."
    )


def equal_precision_step_s(record: Record) -> tuple[float, float]:
    """Seconds a step of gkd and of TRL under autocast, which is TRL's fastest or was measured beside it."""
    contenders = record["contenders"]
    theirs = FLOAT32_WEIGHTS if FLOAT32_WEIGHTS in contenders else record["fastest_trl"]
    ours_s, theirs_s = (contenders[name]["over_rounds"]["step_s"]["median"] for name in ("gkd", theirs))
    return ours_s, theirs_s


def versus_trl_profile_section(results: Path) -> str:
    """Seconds of one step by kind of work and phase, as torch's profiler saw it."""
    tables = (profile_rows(record["profile"]["phases"]) for record in records(results, "versus_trl").values())
    return section(markdown(header, lines) for header, *lines in tables)
