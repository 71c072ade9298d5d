"""The end of a run in a terminal: what it reached, how it answers now, where the time went, what comes next.

Models' texts are cleaned and shown as `Text`, so that nothing in them acts as markup or as an escape code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gkd.monitor.summary import HeldoutSample, RunSummary
from gkd.monitor.text import clean, format_duration, format_value, shorten
from gkd.monitor.titles import DIVERGENCE_TITLES, PHASE_TITLES

_SUMS = {"train", "step"}  # of others: not shown beside them
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_ANSWER_LINES, _ANSWER_CHARACTERS = 6, 420
_PROMPT_CHARACTERS = 240
_SPARKLINE_WIDTH = 48
_LEFT_BAR_WIDTH = 28
_TIME_BAR_WIDTH = 40
_MAX_WIDTH = 100  # longer lines are hard to read


def render_summary(summary: RunSummary, console: Console) -> None:
    """Shows a RunSummary; at most 100 columns wide."""
    width = min(console.width, _MAX_WIDTH)
    ascii_only = console.options.ascii_only
    console.print()
    console.print(_headline(summary), width=width)
    if summary.losses:
        console.print(_loss_line(summary.losses, width, ascii_only), width=width)
    if summary.heldout:
        console.print()
        console.print(Text("held-out divergence from the teacher", style="bold"))
        console.print(_heldout_table(summary, ascii_only), width=width)
        console.print()
    for number, sample in enumerate(summary.samples, start=1):
        console.print(_sample_panel(number, len(summary.samples), sample), width=width)
    if summary.time_s:
        console.print()
        parts = _time_parts(summary)
        console.print(Text(f"where {format_duration(sum(part[1] for part in parts))} went", style="bold"))
        console.print(_time_table(parts, ascii_only), width=width)
    if summary.final_folder is not None:
        console.print()
        line = Text.assemble(("result", "bold"), "  ", (clean(summary.final_folder, " "), "green"))
        console.print(line, soft_wrap=True)
    if summary.next_commands:
        console.print()
        console.print(Text("next", style="bold"))
        for command in summary.next_commands:  # soft_wrap: a command can be copied in one piece
            console.print(Text("  " + clean(command, " "), style="cyan"), soft_wrap=True)


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH, *, ascii_only: bool = False) -> str:
    """`values` as a row of at most `width` blocks, each the mean of its share; `x` where one is not finite."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    count = min(width, len(values))
    cuts = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "x" * count
    low, span = min(finite), max(finite) - min(finite)
    last = len(blocks) - 1
    return "".join(
        blocks[round((mean - low) / span * last) if span else 0] if math.isfinite(mean) else "x" for mean in means
    )


def bar(fraction: float, width: int, *, ascii_only: bool = False) -> str:
    """A horizontal bar: `width` cells stand for 1; eighths of a cell where the encoding has them."""
    fraction = min(1.0, max(0.0, fraction)) if math.isfinite(fraction) else 0.0
    if ascii_only:
        return "#" * round(fraction * width)
    full, eighths = divmod(round(fraction * width * 8), 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")


def _headline(summary: RunSummary) -> Text:
    return Text.assemble(
        (clean(summary.name, " "), "bold green"),
        f"  {summary.steps} {'step' if summary.steps == 1 else 'steps'} in {format_duration(summary.wall_s)}",
    )


def _loss_line(losses: Sequence[float], width: int, ascii_only: bool) -> Text:
    first, last = format_value(losses[0]), format_value(losses[-1])
    room = max(8, min(_SPARKLINE_WIDTH, width - len(first) - len(last) - 12))
    return Text.assemble(
        ("loss", "bold"), f"  {first} ", (sparkline(losses, room, ascii_only=ascii_only), "cyan"), f" {last}"
    )


def _heldout_table(summary: RunSummary, ascii_only: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("nats a token")
    for header in ("before", "after", "left"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("")
    for name, (before, after) in summary.heldout.items():
        short = name.removeprefix("heldout_").removeprefix("heldout/")
        left = after / before if before > 0 else math.nan
        style = "green" if left < 1 else "red" if left > 1 else ""
        filled = bar(left, _LEFT_BAR_WIDTH, ascii_only=ascii_only)
        track = ("." if ascii_only else "░") * (_LEFT_BAR_WIDTH - len(filled))
        table.add_row(
            Text(DIVERGENCE_TITLES.get(short, short.replace("_", " "))),
            Text(format_value(before)),
            Text(format_value(after), style="bold"),
            Text(f"{left:.1%}".replace("%", " %") if math.isfinite(left) else "-", style=style),
            Text.assemble((filled, style), (track, "dim")),
        )
    return table


def _sample_panel(number: int, count: int, sample: HeldoutSample) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True, width=7)
    grid.add_column(ratio=1, overflow="fold")
    rows = (
        ("prompt", sample.prompt, "bold", 3, _PROMPT_CHARACTERS),
        ("teacher", sample.teacher, "cyan", _ANSWER_LINES, _ANSWER_CHARACTERS),
        ("student\nbefore", sample.student_before, "dim", _ANSWER_LINES, _ANSWER_CHARACTERS),
        ("student\nafter", sample.student_after, "green", _ANSWER_LINES, _ANSWER_CHARACTERS),
    )
    for position, (label, text, style, lines, characters) in enumerate(rows):
        if position:
            grid.add_row()
        shown = shorten(clean(text), lines, characters)
        grid.add_row(Text(label, style=style), Text(shown or "(empty)", style=style if shown else "dim italic"))
    title = Text(f"held-out sample {number} of {count}", style="bold")
    return Panel(grid, title=title, title_align="left", border_style="dim", padding=(0, 1))


def _time_table(parts: list[tuple[str, float]], ascii_only: bool) -> Table:
    whole = max(sum(seconds for _, seconds in parts), 1e-9)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for title, seconds in parts:
        share = seconds / whole
        table.add_row(
            Text(title),
            Text(format_duration(seconds)),
            Text(f"{share:.0%}".replace("%", " %"), style="bold"),
            Text(bar(share, _TIME_BAR_WIDTH, ascii_only=ascii_only), style="cyan"),
        )
    return table


def _time_parts(summary: RunSummary) -> list[tuple[str, float]]:
    """(title, seconds): the phases in order, other keys, then what is left of the wall time."""
    seconds = {key.removeprefix("time/").removesuffix("_s"): value for key, value in summary.time_s.items()}
    parts = [(title, seconds[name]) for name, title in PHASE_TITLES.items() if name in seconds]
    further = sorted(set(seconds) - set(PHASE_TITLES) - _SUMS)
    parts += [(clean(name, " ").replace("_", " "), seconds[name]) for name in further]
    outside = summary.wall_s - sum(value for _, value in parts)
    if outside > 0:
        parts.append(("load, evaluate, save" if not further else "the rest", outside))
    return parts
