"""A plan as JSON with keys that stay, and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gkd.monitor.text import format_duration
from gkd.planning.assumptions import assumptions
from gkd.planning.compare import Comparison
from gkd.planning.memory import MemoryPlan, gb, memory_plan
from gkd.planning.models import Architecture
from gkd.planning.setup import Setup
from gkd.planning.suggest import Suggestion, suggest
from gkd.planning.sweep import Sweep
from gkd.planning.time import TimePlan, time_plan


@dataclass(frozen=True)
class Report:
    """What `gkd plan` says. If `asked` does not fit, time and links are those of the suggestion, if there is one."""

    asked: Setup
    suggestion: Suggestion | None
    price_a_device_hour: float | None
    sweeps: Sequence[Sweep] = ()
    comparison: Comparison | None = None

    @property
    def used(self) -> Setup:
        return self.asked if self.suggestion is None else self.suggestion.setup


def make_report(asked: Setup, price_a_device_hour: float | None = None) -> Report:
    """Without sweeps and comparison; `dataclasses.replace` adds them."""
    return Report(asked, None if memory_plan(asked).fits else suggest(asked), price_a_device_hour)


# ---- JSON


def as_json(report: Report) -> dict[str, Any]:
    """Plain values: bytes, seconds, FLOPs and tokens, with their units in the keys."""
    asked = memory_plan(report.asked)
    return {
        "format": 1,
        "student": _model_json(report.asked.student),
        "teacher": _model_json(report.asked.teacher),
        "setup": _setup_json(report.asked),
        "fits": asked.fits,
        "faults": asked.faults,
        "memory": _memory_json(asked),
        "suggestion": _suggestion_json(report.suggestion),
        "time": _time_json(report),
        "links": [
            {
                "name": link.name,
                "link": link.link,
                "bytes_a_step": link.bytes_a_step,
                "bytes_a_token": bytes_a_token(report.used, link.bytes_a_step),
                "seconds": link.seconds,
            }
            for link in time_plan(report.used).links
        ],
        "sweeps": [_sweep_json(sweep) for sweep in report.sweeps],
        "comparison": _comparison_json(report.comparison),
        "assumptions": [item._asdict() for item in assumptions(report.used)],
    }


def bytes_a_token(setup: Setup, bytes_a_step: float) -> float:
    """Of one training device's bytes, those of each token that this device's completions are scored on."""
    return bytes_a_step / (setup.scored_tokens / setup.devices)


def _model_json(model: Architecture) -> dict[str, Any]:
    return {
        "name": model.name,
        "family": model.family,
        "layers": model.layers,
        "hidden": model.hidden,
        "vocabulary": model.vocabulary,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "forward_flops_a_token": model.forward_flops(0) + model.head_flops,
        "kv_bytes_a_token": model.kv_bytes("bfloat16"),
    }


def _setup_json(setup: Setup) -> dict[str, Any]:
    names = (
        "devices", "all_devices", "batch_size", "micro_batch_size", "scoring_micro_batch_size", "zero_stage",
        "offload_optimizer", "offload_parameters", "checkpointing", "student_dtype", "teacher_dtype", "prompt_tokens",
        "completion_tokens", "max_prompt_tokens", "max_new_tokens", "student_share", "sampler_memory_share",
        "teacher_placement", "teacher_devices", "sampler_devices", "sleep_level", "sampler_replicas",
        "staleness", "head_products", "extra_forwards", "needs_reference", "projector_parameters", "state_widths",
        "together_share", "teacher_turns", "proposed_share",
    )  # fmt: skip
    return {"device": setup.device.name, **{name: getattr(setup, name) for name in names}}


def _memory_json(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "limit_bytes": plan.limit_bytes,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.peak_phase,
        "resident_bytes": plan.resident,
        "phase_bytes": plan.phases,
        "phase_peak_bytes": {phase: plan.peak_of(phase) for phase in plan.phases},
        "host_bytes": plan.host,
        "host_limit_bytes": plan.host_limit_bytes,
        "sequences_at_once": plan.sequences_at_once,
    }


def _suggestion_json(suggestion: Suggestion | None) -> dict[str, Any] | None:
    if suggestion is None:
        return None
    return {
        "changes": list(suggestion.changes),
        "why": list(suggestion.why),
        "setup": _setup_json(suggestion.setup),
        "memory": _memory_json(memory_plan(suggestion.setup)),
    }


def _time_json(report: Report) -> dict[str, Any]:
    plan = time_plan(report.used)
    price = report.price_a_device_hour
    return {
        "step_s": plan.step_s,
        "phase_s": {phase: plan.phase_s(phase) for phase in plan.phases},
        "cause_s": {phase: dict(parts) for phase, parts in plan.phases.items()},
        "bottleneck": _bottleneck_json(plan),
        "with_staleness": {
            str(staleness): {"step_s": variant.step_s, "bottleneck": _bottleneck_json(variant)}
            for staleness, variant in _by_staleness(report.used, plan).items()
        },
        "tokens_a_step": plan.tokens_a_step,
        "tokens_a_day": plan.tokens_a_day,
        "price_a_million_tokens": None
        if price is None
        else plan.cost_of_a_million_tokens(price, report.used.all_devices),
    }


def _bottleneck_json(plan: TimePlan) -> dict[str, str]:
    return dict(zip(("phase", "cause"), plan.bottleneck, strict=True))


def _by_staleness(setup: Setup, plan: TimePlan) -> dict[int, TimePlan]:
    """`plan` with the phases one after another, and with sampling ahead, where a served sampler allows that."""
    variants = {0: replace(plan, overlaps=False)}
    if setup.sampler_replicas:
        variants[setup.staleness or 1] = replace(plan, overlaps=True)
    return variants


def _sweep_json(sweep: Sweep) -> dict[str, Any]:
    return {
        "mode": sweep.mode,
        "verdict": sweep.verdict,
        "points": [
            {
                "devices": point.setup.devices,
                "all_devices": point.setup.all_devices,
                "batch_size": point.setup.batch_size,
                "fits": point.fits,
                "step_s": point.time.step_s,
                "tokens_a_s": point.tokens_a_s,
                "efficiency": point.efficiency,
                "bottleneck": _bottleneck_json(point.time),
            }
            for point in sweep.points
        ],
    }


def _comparison_json(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        "origin": comparison.origin,
        "predicted_s": dict(comparison.predicted_s),
        "measured_s": dict(comparison.measured_s),
        "error": {phase: comparison.error(phase) for phase in comparison.predicted_s},
        "step_error": comparison.step_error,
        "slowdown": comparison.slowdown,
        "error_beside_slowdown": {phase: comparison.error_beside_slowdown(phase) for phase in comparison.predicted_s},
    }


# ---- text


def render(report: Report, console: Console) -> None:
    """The whole report."""
    asked = memory_plan(report.asked)
    _head(report, console)
    console.print(_memory_table(asked, "memory of each device, GB"))
    _verdict(report, asked, console)
    used, plan = report.used, time_plan(report.used)
    whose = "" if report.suggestion is None else ", with the change above"
    console.print(_time_table(used, plan, f"seconds of a step{whose}"))
    _totals(report, used, plan, console)
    console.print(_link_table(used, plan, f"what one training device sends or receives{whose}"))
    for sweep in report.sweeps:
        console.print(_sweep_table(sweep))
        _line(console, sweep.verdict)
        console.print()
    if report.comparison is not None:
        console.print(_comparison_table(report.comparison))
        _line(console, f"one factor for the whole machine: measured / predicted = {report.comparison.slowdown:.2f}")
        console.print()
    console.print(_assumption_table(used))


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _head(report: Report, console: Console) -> None:
    setup = report.asked
    for role, model in (("student", setup.student), ("teacher", setup.teacher)):
        active = f", {model.active_parameters / 1e9:.3g} B active" if model.experts else ""
        _line(console, f"{role}  {model.name}  {model.parameters / 1e9:.3g} B parameters{active}")
    nodes = -(-setup.devices // setup.device.devices_a_node)
    where = f"{setup.devices} x {setup.device.name}" + (f" in {nodes} nodes" if nodes > 1 else "")
    _line(
        console,
        f"on       {where}, ZeRO-{setup.zero_stage}, {setup.batch_size} sequences a step, "
        f"{setup.micro_batch_size} a micro-batch, {setup.student_share:.0%} sampled by the student",
    )
    if setup.together_share:
        _line(
            console,
            f"         {setup.together_share:.0%} of the texts are drawn with the teacher, which reads each of them "
            f"{setup.teacher_turns:.3g} times meanwhile",
        )
    if setup.teacher_placement == "unasked":
        _line(console, "         no term of the objective needs the teacher: it is not asked")
    if setup.sampler_replicas:
        own = f"{setup.sampler_replicas} x {setup.device.name} of its own"
        _line(console, f"sampler  {own}, rollout.staleness={setup.staleness}")
    for line in setup.settled_lines:
        _line(console, line)
    console.print()


def _table(title: str, columns: Sequence[tuple[str, bool]]) -> Table:
    """Columns are (name, whether it holds numbers)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, numeric in columns:
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    return table


def _memory_table(plan: MemoryPlan, title: str) -> Table:
    table = _table(title, [("", False), *((phase, True) for phase in plan.phases)])
    for name, size in plan.resident.items():
        table.add_row(name, *[f"{size / 1e9:.2f}"] * len(plan.phases))
    names = dict.fromkeys(name for items in plan.phases.values() for name in items)
    for name in names:
        table.add_row(name, *(f"{items[name] / 1e9:.2f}" if name in items else "" for items in plan.phases.values()))
    peaks = [plan.peak_of(phase) for phase in plan.phases]
    marks = ["red" if peak > plan.limit_bytes else "green" for peak in peaks]
    cells = [Text(f"{peak / 1e9:.2f}", style=style) for peak, style in zip(peaks, marks, strict=True)]
    table.add_row(f"sum, of {plan.limit_bytes / 1e9:.1f} that can be used", *cells, style="bold")
    for name, size in plan.host.items():
        table.add_row(f"host, a node: {name}", f"{size / 1e9:.1f}")
    return table


def _verdict(report: Report, plan: MemoryPlan, console: Console) -> None:
    console.print()
    if plan.fits:
        spare = plan.limit_bytes - plan.peak_bytes
        _line(
            console,
            f"fits: {gb(spare)} to spare while it runs `{plan.peak_phase}`; the sampler holds "
            f"{plan.sequences_at_once:.0f} longest sequences at once",
            "green",
        )
        console.print()
        return
    for fault in plan.faults:
        _line(console, f"does not fit: {fault}", "red")
    if report.suggestion is None:
        _line(console, "no change that is known to the planner makes it fit: use more or larger devices\n")
        return
    _line(console, "the smallest change that fits:")
    for why in report.suggestion.why:
        _line(console, f"  {why}")
    console.print()


def _time_table(used: Setup, plan: TimePlan, title: str) -> Table:
    table = _table(title, [("", False), ("s", True), ("share", True), ("of which most", False)])
    for phase, parts in plan.phases.items():
        cause = max(parts, key=lambda name: parts[name])
        seconds = plan.phase_s(phase)
        shown = f"{cause} {parts[cause]:.3g} s" if seconds else ""
        table.add_row(phase, f"{seconds:.3g}", f"{seconds / plan.step_s:.0%}", shown)
    for staleness, variant in _by_staleness(used, plan).items():
        name = f"step, rollout.staleness={staleness}" if used.sampler_replicas else "step"
        limit = f"limited by {': '.join(variant.bottleneck)}"
        share = f"{variant.step_s / plan.step_s:.0%}"
        table.add_row(name, f"{variant.step_s:.3g}", share, limit, style="bold" if variant == plan else "")
    return table


def _totals(report: Report, used: Setup, plan: TimePlan, console: Console) -> None:
    a_second = plan.tokens_a_step / plan.step_s
    parts = [f"{a_second:,.0f} scored tokens/s", f"{plan.tokens_a_day / 1e6:,.4g} M a day"]
    if report.price_a_device_hour is not None:
        cost = plan.cost_of_a_million_tokens(report.price_a_device_hour, used.all_devices)
        parts.append(f"{cost:.3g} a million tokens at {report.price_a_device_hour:g} a device-hour")
    _line(console, f"{', '.join(parts)}; a step of {plan.tokens_a_step:,.0f} in {format_duration(plan.step_s)}\n")


def _link_table(used: Setup, plan: TimePlan, title: str) -> Table:
    table = _table(title, [("", False), ("over", False), ("GB a step", True), ("B a token", True), ("s", True)])
    for link in plan.links:
        table.add_row(
            link.name,
            link.link,
            f"{link.bytes_a_step / 1e9:.3g}",
            f"{bytes_a_token(used, link.bytes_a_step):,.0f}",
            f"{link.seconds:.3g}",
        )
    table.add_row()
    return table


def _sweep_table(sweep: Sweep) -> Table:
    columns = [("devices", True), ("batch", True), ("fits", False), ("s a step", True), ("tokens/s", True)]
    table = _table(f"more devices, {sweep.mode}", [*columns, ("a device", True), ("limited by", False)])
    for point in sweep.points:
        served = point.setup.all_devices - point.setup.devices
        table.add_row(
            f"{point.setup.devices}" + (f"+{served}" if served else ""),
            f"{point.setup.batch_size}",
            "yes" if point.fits else "no",
            f"{point.time.step_s:.3g}",
            f"{point.tokens_a_s:,.0f}",
            f"{point.efficiency:.0%}" if point.efficiency else "",
            ": ".join(point.time.bottleneck),
        )
    return table


def _comparison_table(comparison: Comparison) -> Table:
    columns = [("", False), ("predicted s", True), ("measured s", True), ("error", True), ("beside one factor", True)]
    table = _table(f"against {comparison.origin}, a step", columns)
    for phase, predicted in comparison.predicted_s.items():
        table.add_row(
            phase,
            f"{predicted:.3g}",
            f"{comparison.measured_s[phase]:.3g}",
            signed_percent(comparison.error(phase)),
            signed_percent(comparison.error_beside_slowdown(phase)),
        )
    totals = (sum(comparison.predicted_s.values()), sum(comparison.measured_s.values()))
    table.add_row(
        "all", f"{totals[0]:.3g}", f"{totals[1]:.3g}", signed_percent(comparison.step_error), "", style="bold"
    )
    return table


def signed_percent(share: float) -> str:
    """`+3%`, `-12%`, and `+0%` for what rounds to nothing."""
    return f"{round(share, 2) + 0.0:+.0%}"


def _assumption_table(used: Setup) -> Table:
    table = _table("assumptions", [("", False), ("value", True), ("", False)])
    for item in assumptions(used):
        table.add_row(item.name, f"{item.value:.4g} {item.unit}".strip(), item.why)
    return table
