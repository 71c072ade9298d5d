"""What a run shows and records: metrics, time split, progress, first batch, and the summary at its end."""

from gkd.monitor.first_batch import first_batch_text, render_first_batch
from gkd.monitor.metrics import METRICS, MetricValue, merge_metrics
from gkd.monitor.monitor import PHASE_LOGGER, Monitor
from gkd.monitor.sinks import JsonlSink, MetricSink, OptionalSink, TensorBoardSink, WandbSink, read_metrics
from gkd.monitor.summary import HeldoutSample, RunSummary, loss_curve, time_totals
from gkd.monitor.terminal import QuietProgress, RunProgress, TerminalProgress, make_console
from gkd.monitor.text import clean
from gkd.monitor.timing import PHASES, PhaseTimer

__all__ = [
    "METRICS",
    "PHASES",
    "PHASE_LOGGER",
    "HeldoutSample",
    "JsonlSink",
    "MetricSink",
    "MetricValue",
    "Monitor",
    "OptionalSink",
    "PhaseTimer",
    "QuietProgress",
    "RunProgress",
    "RunSummary",
    "TensorBoardSink",
    "TerminalProgress",
    "WandbSink",
    "clean",
    "first_batch_text",
    "loss_curve",
    "make_console",
    "merge_metrics",
    "read_metrics",
    "render_first_batch",
    "time_totals",
]
