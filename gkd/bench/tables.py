"""A record as rows of text, first the header: for the terminal and for docs/table.md. And what to conclude from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gkd.bench.methods import LAMBDAS, OBJECTIVES, ON_POLICY, START, SUPERVISED_KD, SWEPT, gkd
from gkd.bench.rows import Rows, number, percent
from gkd.bench.summary import CellResult, Figure, Ratio, estimate, gain_ratio, gains, labels, of, over_seeds, score
from gkd.bench.tasks import TASKS

BASELINE = SUPERVISED_KD.label
PAPER_RATIOS = "2.1, 1.7 and 1.9"
TRAINING_PHASES = ("score", "forward_backward", "optimizer", "sync")
GREEDY, SAMPLED = score("greedy"), score("sampled")


# ---- cells of a table


def shown(label: str) -> str:
    return f"supervised KD: {label}" if label == BASELINE else label


def ratio(found: Ratio | None) -> str:
    if found is None:
        return "–"
    if found.interval is None:
        return f"{found.value:.2f} ({'unbounded' if found.seeds > 1 else 'one seed'})"
    low, high = found.interval
    return f"{found.value:.2f} ({low:.2f} – {high:.2f})"


def compared(cells: Sequence[CellResult]) -> list[str]:
    """The methods that are looked at one by one, as labels: not those of the grid and of other temperatures."""
    additions = labels(cells, "addition")
    plain = labels(cells, "grid") if additions else [BASELINE, *(method.label for method in ON_POLICY)]
    return [*labels(cells, "start", "baseline", "control"), *plain, *additions]


# ---- tables


def method_rows(record: dict[str, Any]) -> Rows:
    """The baselines, the controls, supervised KD, and every divergence on policy; or what was added to them."""
    cells = record["cells"]
    samples = record["size"]["samples"]
    best = max(2**power for power in range(samples.bit_length()))
    header = [
        "",
        "greedy, %",
        "gain, points",
        "sampled, %",
        f"pass@{best}, %",
        "KL(teacher ‖ student)",
        "KL(student ‖ teacher)",
    ]
    header += ["entropy", "distinct", "trained tokens", "sampled tokens", "sampling, s", "training, s", "seeds"]
    rows = [header]
    for label in compared(cells):
        chosen = of(cells, label)
        if not chosen:
            continue
        greedy, *others = (percent(over_seeds(chosen, figure)) for figure in (GREEDY, SAMPLED, score(f"pass@{best}")))
        gained = list(gains(cells, label, GREEDY).values())
        shares = [greedy, percent(estimate(gained) if gained else None), *others]
        nats = [number(over_seeds(chosen, score(name))) for name in ("forward_kl", "reverse_kl", "entropy")]
        diversity = number(over_seeds(chosen, score("distinct_right")), digits=2)
        rows.append([shown(label), *shares, *nats, diversity, *costs(chosen), str(len(chosen))])
    return rows


def costs(cells: Sequence[CellResult]) -> list[str]:
    """Tokens trained on and sampled, and the seconds of sampling and of everything else in training, over seeds."""
    tokens = [statistics.fmean(cell[name] for cell in cells) for name in ("trained_tokens", "sampled_tokens")]
    phases = [cell["seconds"] for cell in cells]
    sampling = statistics.fmean(seconds.get("sample", 0.0) for seconds in phases)
    rest = statistics.fmean(sum(seconds.get(name, 0.0) for name in TRAINING_PHASES) for seconds in phases)
    return [*(f"{count:,.0f}" for count in tokens), f"{sampling:.1f}", f"{rest:.1f}"]


def task_rows(record: dict[str, Any]) -> Rows:
    """Greedy accuracy by task, the teacher's too."""
    cells, teacher = record["cells"], record["teacher"]["greedy"]
    rows = [["greedy, %", *TASKS], ["teacher", *(f"{100 * teacher[task]:.1f}" for task in TASKS)]]
    for label in compared(cells):
        chosen = of(cells, label)
        if chosen:
            rows.append([shown(label), *(percent(over_seeds(chosen, score("greedy", task))) for task in TASKS)])
    return rows


def grid_rows(record: dict[str, Any], name: str) -> Rows:
    """A score by divergence and share of the student's samples, over the seeds that the whole grid has."""
    seeds = record["size"]["seeds"]
    cells = [cell for cell in record["cells"] if cell["seed"] < seeds]
    rows = [[f"{name}, %", *(f"λ = {share:g}" for share in LAMBDAS)]]
    for objective in OBJECTIVES:
        methods = [gkd(objective, share) for share in LAMBDAS]
        rows.append([objective.label, *(percent(over_seeds(of(cells, m.label), score(name))) for m in methods)])
    return rows


def temperature_rows(record: dict[str, Any]) -> Rows:
    """Other temperatures beside 1, all on policy."""
    seeds = record["size"]["seeds"]
    cells = [cell for cell in record["cells"] if cell["seed"] < seeds]
    warmer = labels(cells, "temperature")
    plain = [method.label for method in ON_POLICY if any(label.startswith(method.label) for label in warmer)]
    rows = [["", "greedy, %", "sampled, %", "entropy"]]
    for label in sorted([*plain, *warmer]):
        chosen = of(cells, label)
        shares = [percent(over_seeds(chosen, figure)) for figure in (GREEDY, SAMPLED)]
        rows.append([label, *shares, number(over_seeds(chosen, score("entropy")))])
    return rows


def ratio_rows(record: dict[str, Any]) -> Rows:
    """Gain of each on-policy method over the initial student, divided by that of supervised KD."""
    figures = {"greedy": GREEDY, **{task: score("greedy", task) for task in TASKS}, "sampled": SAMPLED}
    rows = [["gain ÷ gain of supervised KD", *figures]]
    for method in ON_POLICY:
        found = (gain_ratio(record["cells"], method.label, BASELINE, figure) for figure in figures.values())
        rows.append([method.label, *map(ratio, found)])
    return rows


def sweep_rows(record: dict[str, Any], name: str) -> Rows:
    """The same ratio, of one kind of accuracy, where one thing differs from the table's own size."""
    figure = {"greedy": GREEDY, "sampled": SAMPLED}[name]
    cells, seeds = record["cells"], record["size"]["seeds"]
    on_policy = [method.label for method in SWEPT if method.student_share == 1.0]
    header = [f"{name} accuracy", "initial student, %", "supervised KD, %"]
    for label in on_policy:
        header += [f"{label}, %", "ratio of gains"]
    rows = [header]
    for setting in dict.fromkeys(cell["setting"] for cell in cells):
        known = [cell for cell in cells if cell["seed"] < seeds]
        row = [percent(over_seeds(of(known, label, setting), figure)) for label in (START.label, BASELINE)]
        for label in on_policy:
            row.append(percent(over_seeds(of(known, label, setting), figure)))
            row.append(ratio(gain_ratio(known, label, BASELINE, figure, setting)))
        rows.append([setting or "the table above", *row])
    return rows


# ---- what to conclude


def caption(record: dict[str, Any]) -> str:
    """With which models, how much data and on what a record was measured."""
    size, parameters, cells = record["size"], record["parameters"], record["cells"]
    share = parameters["teacher"] / parameters["student"]
    greedy, sampled = (statistics.fmean(record["teacher"][name].values()) for name in ("greedy", "sampled"))
    failed = sum("failed" in cell for cell in cells)
    longer = f", {size['longer']} times as many for *SFT, longer*" if labels(cells, "control") else ""
    between = f"; the assistant {parameters['assistant']:,}" if labels(cells, "addition") else ""
    return (
        f"Teacher {parameters['teacher']:,} parameters, {100 * greedy:.1f} % greedy and {100 * sampled:.1f} % sampled; "
        f"students {parameters['student']:,}, {share:.1f} times smaller{between}. {size['train_problems']} train and "
        f"{size['heldout_problems']} held-out problems a task; {size['trained_tokens']:,} trained tokens a cell"
        f"{longer}; batches of {size['batch_size']}, learning rate "
        f"{size['lr']:g}. {len(cells)} of {record['planned_cells']} cells, of which {failed} failed, in "
        f"{record['cell_seconds'] / 60:.0f} minutes of one core.  \n{record['device']}; {record['versions']}."
    )


def verdict(record: dict[str, Any]) -> str:
    """Whether on-policy GKD gains more than supervised KD here, as the paper found it does."""
    sentences = [_comparison(record, name, figure) for name, figure in (("greedy", GREEDY), ("sampled", SAMPLED))]
    return "  \n".join([*sentences, f"The paper's ratios on its three tasks: {PAPER_RATIOS}."])


def _comparison(record: dict[str, Any], name: str, figure: Figure) -> str:
    """Of one kind of accuracy, over all tasks."""
    found = {method.label: gain_ratio(record["cells"], method.label, BASELINE, figure) for method in ON_POLICY}
    known = {label: one for label, one in found.items() if one is not None}
    if not known:
        return f"In {name} accuracy supervised KD gains nothing, or is not finished: there is no ratio to it."
    more = [label for label, one in known.items() if one.interval is not None and one.interval[0] > 1]
    less = [label for label, one in known.items() if one.interval is not None and one.interval[1] < 1]
    values = [one.value for one in known.values()]
    return (
        f"In {name} accuracy on-policy GKD gains {min(values):.2f} to {max(values):.2f} times what supervised KD does. "
        f"At 95 %, more: {'; '.join(more) or 'none'}. Less: {'; '.join(less) or 'none'}. "
        f"Undecided: {len(known) - len(more) - len(less)} of {len(known)} divergences."
    )
