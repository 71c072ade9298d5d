"""A record as rows of text, first the header: for the terminal and for docs. And what to conclude from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.bench.rows import Rows, number
from gkd.bench.summary import Estimate, estimate
from gkd.bench.text.marks import Mark, Reading, Record, common_seconds, finished, readings, step_seconds
from gkd.bench.text.methods import START, SUPERVISED_KD
from gkd.bench.text.plan import TEXTS

NOT_TIMED = "The seconds' mark is not known: the steps were not timed yet; gkd bench text --part times does it."
BASELINE = SUPERVISED_KD.label


@dataclass(frozen=True)
class Figure:
    """What a student is judged by. `sense`: 1 where more is better, -1 where less is, 0 where neither is."""

    title: str
    value: Callable[[dict[str, Any]], float]  # of a look
    sense: int = -1
    scale: float = 1.0
    digits: int = 3
    of_teacher: str = ""  # what it is called among the figures of the teacher's own texts


# t teacher, s student; on the teacher's texts, on the student's own samples, or of its greedy answers
FIGURES = (
    Figure("KL(t ‖ s), texts", lambda look: look["on_teacher"]["forward_kl"]),
    Figure("KL(s ‖ t), texts", lambda look: look["on_teacher"]["reverse_kl"]),
    Figure("JSD, texts", lambda look: look["on_teacher"]["jsd"], digits=4),
    Figure("KL(s ‖ t), own", lambda look: look["on_own"]["reverse_kl"]),
    Figure("JSD, own", lambda look: look["on_own"]["jsd"], digits=4),
    Figure("surprise, own", lambda look: look["teacher_nll"], of_teacher="teacher_nll"),
    Figure("Rouge-L, %", lambda look: look["rouge_l"], 1, 100.0, 1),
    Figure("answer, tokens", lambda look: look["answer_tokens"], 0, digits=1, of_teacher="answer_tokens"),
    Figure("repeated 4-grams, %", lambda look: look["repeated_4grams"], 0, 100.0, 1, of_teacher="repeated_4grams"),
)
DRIFT = "jsd"


def labels(record: Record) -> list[str]:
    """The initial student, then the methods that have a finished run."""
    return list(dict.fromkeys(run["method"] for run in finished(record)))


def mark_rows(record: Record, mark: Mark) -> Rows:
    """Every figure at a mark, with what the runs had had by then."""
    rows = [
        [
            "",
            *(figure.title for figure in FIGURES),
            "trained tokens",
            "steps",
            *(["s"] if record["times"] else []),
            "seeds",
        ]
    ]
    step_s = step_seconds(record)
    for label in labels(record):
        found = readings(record, label, mark)
        values = [number(over(found, figure), figure.scale, figure.digits) for figure in FIGURES]
        tokens, steps = (statistics.fmean(one.look[name] for one in found) for name in ("tokens", "step"))
        seconds = [f"{steps * step_s.get(label, 0.0):.0f}"] if step_s else []
        rows.append([label, *values, f"{tokens:,.0f}", f"{steps:.1f}", *seconds, str(len(found))])
    return [*rows, *teacher_rows(record, len(rows[0]))]


def teacher_rows(record: Record, columns: int) -> Rows:
    """The teacher's own texts by the same figures, if the run that measures them is finished."""
    found = next((run["teacher"] for run in finished(record) if "teacher" in run), None)
    if found is None:
        return []
    cells = [f"{f.scale * found[f.of_teacher]:.{f.digits}f}" if f.of_teacher else "–" for f in FIGURES]
    return [["the teacher itself", *cells, *["–"] * (columns - len(cells) - 1)]]


def over(found: Sequence[Reading], figure: Figure) -> Estimate:
    return estimate([figure.value(reading.look) for reading in found])


def drift_rows(record: Record) -> Rows:
    """The JSD at the beginning and at the end of a text, at the tokens' mark."""
    rows = [["JSD by place", "teacher's texts, first", "last", "own samples, first", "last"]]
    for label in labels(record):
        found = readings(record, label, "tokens")
        cells = [
            number(estimate([reading.look["positions"][texts][DRIFT][place] for reading in found]), digits=4)
            for texts in ("on_teacher", "on_own")
            for place in (0, -1)
        ]
        rows.append([label, *cells])
    return rows


def time_rows(record: Record) -> Rows:
    """Seconds a step by phase, medians over rounds; what the teacher's texts add; and what the machine did besides."""
    phases = {"sampling": ("sample",), "teacher": ("score",), "training": ("forward_backward", "optimizer")}
    phases |= {"sync": ("sync",)}
    rows = [["seconds a step", *phases, "all of it", "with the teacher's texts", "stolen, %", "load before"]]
    rounds, step_s = record["times"], step_seconds(record)
    for label, seconds in step_s.items():
        found = [one[label] for one in rounds]
        parts = [
            statistics.median(
                statistics.median(sum(step.get(name, 0.0) for name in names) for step in one["steps"][1:])
                for one in found
            )
            for names in phases.values()
        ]
        whole = statistics.median(statistics.median(step["all"] for step in one["steps"][1:]) for one in found)
        stolen, load = (max(one["machine"][name] for one in found) for name in ("stolen_share", "load_before"))
        cells = [f"{value:.2f}" for value in (*parts, whole, seconds)]
        rows.append([label, *cells, f"{100 * stolen:.1f}", f"{load:.1f}"])
    return rows


# ---- what to conclude


def caption(record: Record) -> str:
    """With which models, how much of everything and on what a record was measured."""
    size, runs = record["size"], record["runs"]
    failed = sum("failed" in run for run in runs)
    dtypes = ", ".join(dict.fromkeys(run["dtype"] for run in finished(record)))
    devices = ", and ".join(dict.fromkeys(run.get("device", record["device"]) for run in runs)) or record["device"]
    sentences = [
        f"Teacher {record['teacher']}, student {size['layers']} of its layers, in {dtypes or 'no run yet'}; batches of "
        f"{size['batch_size']} completions of at most {size['max_new_tokens']} tokens, learning rate {size['lr']:g}, "
        f"constant. {size['trained_tokens']:,} trained tokens to the tokens' mark, {size['heldout_prompts']} held-out "
        f"prompts. {len(runs)} of {record['planned_runs']} runs, of which {failed} failed."
    ]
    if record["times"]:
        text_s = statistics.median(found[TEXTS]["text_s"] for found in record["times"])
        sentences.append(
            f"The seconds' mark is at {common_seconds(record):.0f} s by {len(record['times'])} rounds of timing; a "
            f"teacher's text takes {text_s:.2f} s."
        )
    return f"{' '.join(sentences)}  \n{devices}; {record['versions']}."


def verdict(record: Record) -> str:
    """What differs from supervised KD, seed by seed, at 95 %."""
    marks: list[Mark] = ["tokens", "seconds"] if record["times"] else ["tokens"]
    sentences = [_compared(record, mark) for mark in marks]
    return "  \n".join([*sentences, *([] if record["times"] else [NOT_TIMED])])


def _compared(record: Record, mark: Mark) -> str:
    """Of every figure of which less or more is better: who is surely better than supervised KD, and who worse."""
    gains = {
        figure.title: {label: _gain(record, label, figure, mark) for label in labels(record)}
        for figure in FIGURES
        if figure.sense
    }
    known = [gain for by_label in gains.values() for gain in by_label.values() if gain is not None]
    if not known:
        return f"At equal {mark} there are no two seeds yet to compare with {BASELINE}."
    parts = [
        f"{title}: {side} {', '.join(found)}"
        for title, by_label in gains.items()
        for side, sign in (("better", 1), ("worse", -1))
        if (found := [label for label, gain in by_label.items() if gain is not None and _is_sure(gain, sign)])
    ]
    undecided = sum(not _is_sure(gain, 1) and not _is_sure(gain, -1) for gain in known)
    found = f"{'. '.join(parts)}. " if parts else ""
    return f"At equal {mark}, against {BASELINE}, at 95 %. {found}Undecided: {undecided} of {len(known)} comparisons."


def _is_sure(gain: Estimate, sign: int) -> bool:
    return sign * gain.mean > (gain.half_width or 0.0)


def _gain(record: Record, label: str, figure: Figure, mark: Mark) -> Estimate | None:
    """Over supervised KD, over the seeds that both have; None where those are fewer than two, and of what is no method
    to compare."""
    if label in (START.label, BASELINE):
        return None
    ours, baseline = (
        {reading.seed: figure.value(reading.look) for reading in readings(record, one, mark)}
        for one in (label, BASELINE)
    )
    shared = sorted(ours.keys() & baseline.keys())
    if len(shared) < 2:
        return None
    return estimate([figure.sense * (ours[seed] - baseline[seed]) for seed in shared])
