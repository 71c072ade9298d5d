"""Makes tables and plots of the results: python benchmarks/tables.py [--write FILE] [--check FILE] [--plots FOLDER]

A file says where a table goes: what stands between the lines <!-- begin: NAME --> and <!-- end: NAME --> is replaced.
The names are divergence (medians of value and gradient, one line a shape), divergence-full (a table for each case),
linear_divergence, versus_trl (whole runs), versus_trl-profile (a step of gkd), packing and teacher_scoring. Every CSV
or JSON in benchmarks/results/ whose name begins so is part of it. --check changes nothing and fails if a file is not
what --write would make of it. --plots needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from contenders.show import profile_rows

RESULTS = Path(__file__).parent / "results"
BOTH = "value+gradient"
LOGIT_BYTES = {"bfloat16": 2, "float32": 4}
OURS, PEER, LINE, TEXT = "#d9822b", "#6f8fb3", "#c4504a", "#7a7a7a"  # readable on white and on black
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for file in options.write:
        file.write_text(filled(file, options.results))
    stale = [str(file) for file in options.check if file.read_text() != filled(file, options.results)]
    if stale:
        sys.exit(f"not what the results say: {', '.join(stale)}; run benchmarks/tables.py --write {' '.join(stale)}")
    if options.plots:
        for path in plots(options.results, options.plots):
            print(path)
    if not (options.write or options.check or options.plots):
        print("\n\n".join(f"## {name}\n\n{make(options.results)}" for name, make in SECTIONS.items()))


def filled(file: Path, results: Path) -> str:
    """The file's text with every section made anew."""
    text = file.read_text()
    names = re.findall(r"^<!-- begin: (.+?) -->$", text, flags=re.MULTILINE)
    if not names:
        sys.exit(f"{file} has no line <!-- begin: NAME -->")
    for name in names:
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if name not in SECTIONS or end not in text:
            sys.exit(f"{file}: {name!r} has no end or is none of {', '.join(SECTIONS)}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}{SECTIONS[name](results)}\n{end}{rest.split(end, 1)[1]}"
    return text


# ---- reading


def read(results: Path, op: str) -> dict[str, list[Row]]:
    """The rows of each CSV of an op, by the file's name without its ending."""
    found = {}
    for path in sorted(results.glob(f"{op}*.csv")):
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def grouped(rows: Iterable[Row], *columns: str) -> list[list[Row]]:
    """Rows with equal values in these columns, in the order in which they come first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(groups.values())


def shape(row: Row) -> str:
    if "student_hidden" in row:
        return f"{row['rows']} × ({row['student_hidden']}, {row['teacher_hidden']}) → {row['vocab']}"
    return f"{row['rows']} × {row['vocab']}"


def divergence_name(row: Row) -> str:
    return row["kind"] + (f"({row['beta']})" if row["kind"] == "jsd" else "")


def floor_ms(rows: Sequence[Row]) -> float | None:
    """What a copy of the bytes that must move would take; the same for every implementation of a case."""
    ours = next((row for row in rows if row["implementation"] == "gkd"), None)
    return float(ours["ms_p50"]) * float(ours["copy_share"]) if ours and ours["copy_share"] else None


# ---- Markdown


def three_digits(number: str | float | None) -> str:
    """A number as people read it: 0.0123, 4.56, 78.9, 1234."""
    if number in ("", None):
        return "–"
    value = float(number)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: str | float) -> str:
    return "–" if share == "" else f"{three_digits(100 * float(share))} %"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    left = "|" + "---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", left, *("| " + " | ".join(line) + " |" for line in lines)])


def caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    settings = f"T = {three_digits(first['temperature'])}, {percent(first['ignored'])} of the rows ignored"
    measured = f"median of {first['repeats']} rounds"
    threads = "" if first["device"].startswith("NVIDIA") else f", {first['threads']} threads"
    return f"{first['device']}{threads}; {settings}; {measured}.  \n{first['versions']}."


def divergence_section(results: Path) -> str:
    """ms of value and gradient, one line a shape and kind; then what memory and error each implementation has."""
    parts = []
    for rows in read(results, "divergence").values():
        chosen = [row for row in rows if row["work"] == BOTH]
        if chosen:
            parts += [caption(chosen), times_table(chosen), quality_table(chosen)]
    return "\n\n".join(parts) or "Not measured yet."


def times_table(rows: Sequence[Row]) -> str:
    names = [group[0]["implementation"] for group in grouped(rows, "implementation") if any(r["ms_p50"] for r in group)]
    lines = []
    for case in grouped(rows, "rows", "vocab", "dtype", "kind"):
        by_name = {row["implementation"]: row for row in case}
        times = [three_digits(by_name[name]["ms_p50"]) if name in by_name else "–" for name in names]
        share = percent(by_name["gkd"]["copy_share"])
        label = f"{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}"
        lines.append([label, three_digits(floor_ms(case)), *times, share])
    return markdown(["ms", "copy of the bytes", *names, "gkd, of copy rate"], lines)


def quality_table(rows: Sequence[Row]) -> str:
    """The worst over the cases; memory in units of one side's logits, the gradient of their size among it."""
    lines = []
    for group in grouped(rows, "implementation"):
        name, ran = group[0]["implementation"], [row for row in group if row["ms_p50"]]
        memory = [float(row["peak_extra_mb"]) * 1e6 / logits_bytes(row) for row in ran if row["peak_extra_mb"]]
        errors = [[float(row[column]) for row in ran if row[column]] for column in ("value_error", "gradient_error")]
        slower = [float(row["ratio_to_gkd"]) for row in ran]
        worst = [f"{max(numbers):.1e}" if numbers else "–" for numbers in errors]
        spread = f"{three_digits(min(slower))} to {three_digits(max(slower))}" if slower else "–"
        note = "; ".join(
            dict.fromkeys(row["note"] for row in group if row["note"] and "compiled in" not in row["note"])
        )
        lines.append([name, spread, three_digits(max(memory) if memory else None), *worst, note])
    header = ["", "× gkd's time", "extra memory, × logits", "value error", "gradient error", "note"]
    return markdown(header, lines)


def logits_bytes(row: Row) -> int:
    return int(row["rows"]) * int(row["vocab"]) * LOGIT_BYTES[row["dtype"]]


def full_section(op: str, results: Path) -> str:
    """A table for each case, with every implementation, also those that did not run."""
    parts = []
    for rows in read(results, op).values():
        parts.append(caption(rows))
        shape_columns = [name for name in ("rows", "student_hidden", "teacher_hidden", "vocab") if name in rows[0]]
        for case in grouped(rows, *shape_columns, "dtype", "kind", "work"):
            title = f"**{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}, {case[0]['work']}**"
            parts += [title, case_table(case)]
    return "\n\n".join(parts) or "Not measured yet."


def case_table(case: Sequence[Row]) -> str:
    """One line an implementation."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["implementation"],
        "ms": lambda row: three_digits(row["ms_p50"]),
        "p20 – p80": lambda row: f"{three_digits(row['ms_p20'])} – {three_digits(row['ms_p80'])}",
        "× gkd": lambda row: three_digits(row["ratio_to_gkd"]),
    }
    if "ratio_to_gemms" in case[0]:
        columns["× bare products"] = lambda row: three_digits(row["ratio_to_gemms"])
        columns["TFLOP/s"] = lambda row: three_digits(row["tflop_per_s"])
    else:
        columns["GB/s"] = lambda row: three_digits(row["gb_per_s"])
        columns["of copy rate"] = lambda row: percent(row["copy_share"])
    columns |= {
        "extra MB": lambda row: three_digits(row["peak_extra_mb"]),
        "value error": lambda row: row["value_error"] and f"{float(row['value_error']):.1e}",
        "gradient error": lambda row: row["gradient_error"] and f"{float(row['gradient_error']):.1e}",
        "note": lambda row: row["note"],
    }
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in case])


# ---- whole runs against TRL


def versus_trl_section(results: Path) -> str:
    """Where a step's seconds go, tokens, memory and held-out divergence: medians over rounds, one line a contender."""
    parts = []
    for record in versus_trl_records(results):
        work = record["work"]
        name = work["kind"] + (f"({work['beta']})" if work["kind"] == "jsd" else "")
        rounds = len(record["contenders"]["gkd"]["rounds"])
        size = f"{work['batch_size']} prompts × {work['max_new_tokens']} new tokens a step, {name}"
        measured = f"medians (least – most) of {rounds} rounds of {work['steps']} steps, without the first"
        parts += [
            f"{record['device']}, {record['threads']} threads; {size}; {measured}.  \n{record['versions']}.",
            versus_trl_table(record),
            versus_trl_summary(record),
        ]
    return "\n\n".join(parts) or "Not measured yet."


def versus_trl_records(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("versus_trl*.json"))]


def versus_trl_table(record: dict[str, Any]) -> str:
    lines = []
    for name, contender in record["contenders"].items():
        found = contender["over_rounds"]
        step = found["step_s"]
        parts = [
            three_digits(found[f"{part}_s"]["median"] or None) for part in ("sampling", "scoring", "training", "sync")
        ]
        lines.append(
            [
                name,
                f"{three_digits(step['median'])} ({three_digits(step['least'])} – {three_digits(step['most'])})",
                *parts,
                three_digits(found["tokens_per_s"]["median"]),
                three_digits(found["peak_rss_bytes"]["median"] / 2**30),
                f"{found['heldout/jsd']['median']:.4f}",
                f"{found['heldout/forward_kl']['median']:.3f}",
            ]
        )
    before = record["heldout_before"]
    untrained = [f"{before['heldout/jsd']:.4f}", f"{before['heldout/forward_kl']:.3f}"]
    lines.append(["the student before", *["–"] * 7, *untrained])
    header = ["", "s a step", "sampling", "scoring", "training", "weight sync", "tokens/s", "peak GiB"]
    return markdown([*header, "held-out JSD", "held-out KL"], lines)


def versus_trl_summary(record: dict[str, Any]) -> str:
    bound = record["bound"]
    rate = statistics.median(bound["bf16_matmul_flops_per_s"]) / 1e12
    speedup, memory = (three_digits(record[f"{name}_vs_fastest_trl"]) for name in ("speedup", "memory"))
    return (
        f"{record['fastest_trl']}, the faster of the two, takes {speedup} times as long a step as gkd, which needs "
        f"{memory} times its memory. Bare bfloat16 products reach {three_digits(rate)} TFLOP/s here; gkd's training "
        f"half, {three_digits(bound['training_flops_a_step'] / 1e12)} TFLOP a step, reaches "
        f"{percent(bound['share_reached'])} of that.{equal_precision(record)}"
    )


def equal_precision(record: dict[str, Any]) -> str:
    """What the trials say of TRL with float32 master weights under autocast, which is what gkd keeps."""
    trials, settings = record["trials"], record["contenders"][record["fastest_trl"]]["settings"]
    if not trials.get("gkd") or settings["precision"] != "bfloat16":
        return ""
    ours = min(trial["step_s"] for trial in trials["gkd"])
    theirs = min(
        trial["step_s"]
        for name in record["speedup_by_trainer"]
        for trial in trials[name]
        if trial["precision"] == "autocast"
    )
    return (
        " TRL's weights are bfloat16 alone, which was its fastest; with float32 master weights, which gkd keeps, its "
        f"best trial took {three_digits(theirs)} s a step, {three_digits(theirs / ours)} times gkd's."
    )


def versus_trl_profile_section(results: Path) -> str:
    """Seconds of one step by kind of work and phase, as torch's profiler saw it."""
    tables = (profile_rows(record["profile"]["phases"]) for record in versus_trl_records(results))
    return "\n\n".join(markdown(header, lines) for header, *lines in tables) or "Not measured yet."


# ---- packed against padded


def packing_section(results: Path) -> str:
    """A step's forward and backward both ways, one table a record."""
    parts = []
    for path in sorted(results.glob("packing*.json")):
        record = json.loads(path.read_text())
        lines = [
            [name, three_digits(way["seconds_p50"]), f"{way['tokens_per_s']}", f"{way['micro_batches']}",
             f"{way['positions_computed']}", percent(way["padding"])]
            for name, way in record["ways"].items()
        ]  # fmt: skip
        parts += [
            f"{record['device']}, {record['versions']}; {record['batch']} rollouts, {record['tokens']} tokens in all, "
            f"padded {record['micro_batch_size']} a forward, packed {record['micro_batch_tokens']} tokens a forward.",
            markdown(["", "s", "tokens/s", "forwards", "positions computed", "padding"], lines),
            f"Packed is {record['speedup']} times as fast; in float32 the gradients differ by "
            f"{record['gradient_difference_float32']:.1e} of their norm.",
        ]
    return "\n\n".join(parts) or "Not measured yet."


# ---- ways to score a served teacher


def teacher_scoring_section(results: Path) -> str:
    """Seconds of a pass and bytes a token of each way, one table a record."""
    parts = []
    for path in sorted(results.glob("teacher_scoring*.json")):
        record = json.loads(path.read_text())
        passes = len(record["methods"]["hidden states"]["seconds"])
        parts += [
            f"{record['model']}, {record['dtype']}, {record['sequences']} sequences of {record['tokens']} tokens; "
            f"medians of {passes} passes on {record['device']} (load {record['load_average']}), {record['vllm']}.",
            teacher_scoring_table(record["methods"]),
        ]
    return "\n\n".join(parts) or "Not measured yet."


def teacher_scoring_table(ways: dict[str, dict[str, Any]]) -> str:
    ours, lines = ways["hidden states"], []
    for name, way in ways.items():
        seconds, size = way["median_s_of_the_work"], way["bytes_a_token"]
        ratios = seconds / ours["median_s_of_the_work"], size / ours["bytes_a_token"]
        label = name + (f" ({way['note']})" if way["note"] else "")
        lines.append([label, three_digits(seconds), f"{size:,.0f}", *(f"{three_digits(ratio)} ×" for ratio in ratios)])
    return markdown(["way", "s a pass", "bytes a token", "time", "bytes"], lines)


SECTIONS: dict[str, Callable[[Path], str]] = {
    "versus_trl": versus_trl_section,
    "versus_trl-profile": versus_trl_profile_section,
    "packing": packing_section,
    "divergence": divergence_section,
    "divergence-full": lambda results: full_section("divergence", results),
    "linear_divergence": lambda results: full_section("linear_divergence", results),
    "teacher_scoring": teacher_scoring_section,
}


# ---- plots


def plots(results: Path, folder: Path) -> list[Path]:
    """One SVG for each CSV, kind and dtype, a panel for each shape. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for op in ("divergence", "linear_divergence"):
        for name, rows in read(results, op).items():
            ran = [row for row in rows if row["work"] == BOTH and row["ms_p50"]]
            for group in grouped(ran, "kind", "dtype"):
                path = folder / f"{name}_{group[0]['kind']}_{group[0]['dtype']}.svg"
                plot(group, path)
                made.append(path)
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars of ms with quantiles; the dashed line is what no implementation gets below."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    panels = grouped(rows, *(name for name in ("rows", "student_hidden", "teacher_hidden", "vocab") if name in rows[0]))
    bars = [len(panel) for panel in panels]
    style = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    style |= {"axes.edgecolor": TEXT, "svg.hashsalt": path.stem, "font.size": 9}  # the salt: equal files for equal data
    with matplotlib.rc_context(style):
        figure, grid = pyplot.subplots(
            len(panels), 1, figsize=(7, 0.26 * sum(bars) + 0.8 * len(panels)), height_ratios=bars, squeeze=False
        )
        for axes, panel in zip(itertools.chain(*grid), panels, strict=True):
            draw(axes, panel)
        grid[-1][0].set_xlabel("ms")
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def draw(axes: Any, case: Sequence[Row]) -> None:
    """One case, the fastest on top."""
    bare = next((float(row["ms_p50"]) for row in case if row["implementation"] == "bare_gemms"), None)
    floor, floor_name = (bare, "matrix products alone") if bare else (floor_ms(case), "copy of the same bytes")
    case = sorted(
        (row for row in case if row["implementation"] != "bare_gemms"),
        key=lambda row: float(row["ms_p50"]),
        reverse=True,
    )
    names, times = [row["implementation"] for row in case], [float(row["ms_p50"]) for row in case]
    spread = [
        [ms - float(row["ms_p20"]) for ms, row in zip(times, case, strict=True)],
        [float(row["ms_p80"]) - ms for ms, row in zip(times, case, strict=True)],
    ]
    colours = [OURS if name == "gkd" else PEER for name in names]
    bars = axes.barh(names, times, xerr=spread, color=colours, error_kw={"ecolor": TEXT, "elinewidth": 0.8})
    axes.bar_label(bars, [three_digits(ms) for ms in times], padding=6)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{shape(case[0])}, {case[0]['dtype']}, {divergence_name(case[0])}", loc="left", fontsize=9)
    if floor:
        axes.axvline(floor, color=LINE, linestyle="--", linewidth=1.2)
        axes.set_title(f"- - {floor_name}: {three_digits(floor)} ms", loc="right", fontsize=8, color=LINE)


if __name__ == "__main__":
    main()
