"""The pictures beside a report, for where HTML cannot go: losses, time split, and the divergence by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gkd.monitor.titles import PHASE_TITLES
from gkd.report.charts import metric_label
from gkd.report.data import Column, RunData
from gkd.report.tokens import chosen_profiles, moment, strip_maximum
from gkd.run_files import REPORT_PICTURES, picture_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE_INCHES, _DPI = (10.0, 4.2), 150


def write_figures(runs: Sequence[RunData], report: Path) -> list[Path]:
    """Writes `<report>.loss.png` and `<report>.time.png` beside the report, and if positions were measured
    `<report>.positions.png`; returns their paths.

    Raises ImportError without matplotlib, OSError if a file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no state of the process is touched, no display is wanted

    paths = []
    draws = dict(zip(REPORT_PICTURES, (_draw_loss, _draw_time, _draw_positions), strict=True))
    if not any(run.positions for run in runs):
        del draws["positions"]
    for what, draw in draws.items():
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
        draw(figure, runs)
        paths.append(picture_beside(report, what))
        figure.savefig(paths[-1])
    return paths


def _draw_loss(figure: Figure, runs: Sequence[RunData]) -> None:
    left, right = figure.subplots(1, 2)
    names = _divergences(runs)
    for place, run in enumerate(runs):
        _plot(left, run, run.metrics.get("loss", []), f"C{place}", run.label)
        for which, name in enumerate(names):
            label = metric_label(name) if len(runs) == 1 else run.label
            _plot(right, run, run.metrics.get(name, []), f"C{place + which}", label)
    _finish(left, "loss", legend=len(runs) > 1)
    which = metric_label(names[0]) if len(names) == 1 else "divergence"
    _finish(right, f"{which} from the teacher", legend=True)


def _divergences(runs: Sequence[RunData]) -> list[str]:
    """All of a run; of several runs the one that most of them have, as more lines could not be told apart."""
    names = [name for run in runs for name in run.metrics if name.startswith("divergence/")]
    return list(dict.fromkeys(names)) if len(runs) == 1 else [max(names, key=names.count)] if names else []


def _draw_time(figure: Figure, runs: Sequence[RunData]) -> None:
    axes = figure.subplots()
    labels = [_plain(run.label) for run in runs]
    offsets = [0.0] * len(runs)
    for phase, title in PHASE_TITLES.items():
        minutes = [run.time_s.get(phase, 0.0) / 60 for run in runs]
        if any(minutes):
            axes.barh(range(len(runs)), minutes, left=offsets, label=title)
            offsets = [a + b for a, b in zip(offsets, minutes, strict=True)]
    axes.set_yticks(range(len(runs)), labels)
    axes.invert_yaxis()
    axes.set(title="where the time of the steps went", xlabel="minutes")
    axes.margins(y=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if any(offsets):
        axes.legend(frameon=False, ncols=3, loc="lower center")


def _draw_positions(figure: Figure, runs: Sequence[RunData]) -> None:
    """A strip a run, one below the other, all on one scale."""
    from matplotlib.colors import PowerNorm

    measured = [run for run in runs if run.positions]
    rows = sum(len(chosen_profiles(run)) for run in measured)
    figure.set_size_inches(_SIZE_INCHES[0], max(_SIZE_INCHES[1], 0.3 * rows + len(measured)))
    strips = figure.subplots(len(measured), 1, squeeze=False)[:, 0]
    image = None
    for axes, run in zip(strips, measured, strict=True):
        profiles = chosen_profiles(run)
        last = len(profiles[0].tokens) * profiles[0].bucket_tokens
        image = axes.imshow(
            [_with_gaps(profile.means["forward_kl"]) for profile in profiles],
            aspect="auto",
            interpolation="nearest",
            cmap="inferno_r",
            norm=PowerNorm(0.5, vmin=0, vmax=strip_maximum(runs) or 1),
            extent=(0.5, last + 0.5, len(profiles) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(profiles)), [moment(run, profile) for profile in profiles])
        axes.set_title(f"forward KL by position: {_plain(run.label)}" if len(runs) > 1 else "forward KL by position")
    strips[-1].set_xlabel("token of the completion")
    assert image is not None  # one run at least has positions
    figure.colorbar(image, ax=list(strips), label="nats")


def _with_gaps(column: Column) -> list[float]:
    return [float("nan") if value is None else value for value in column]


def _plot(axes: Axes, run: RunData, column: Column, colour: str, label: str) -> None:
    values = _with_gaps(column)
    marker = "o" if len(values) < 3 else None
    axes.plot(run.steps[: len(values)], values, color=colour, marker=marker, lw=1.3, label=_plain(label))


def _finish(axes: Axes, title: str, *, legend: bool) -> None:
    axes.set(title=title, xlabel="step", ylabel="nats")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.lines:
        axes.legend(frameon=False, fontsize="small")


def _plain(label: str) -> str:
    """Neither mathematics nor a label that a legend leaves out."""
    return label.replace("$", r"\$").lstrip("_") or "run"
