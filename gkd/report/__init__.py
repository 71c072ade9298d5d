"""A run, or several, as one HTML file that needs no network, and as pictures beside it."""

from gkd.report.data import RunData, read_runs
from gkd.report.figures import write_figures
from gkd.report.render import render_report, write_report

__all__ = ["RunData", "read_runs", "render_report", "write_figures", "write_report"]
