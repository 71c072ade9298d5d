"""gkd report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gkd


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Default: report.html, in the run folder if there is one run."),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Pictures of losses, time and positions, too.")] = True,
) -> None:
    """Show a run, or compare several, in one HTML file that needs no network."""
    from gkd.errors import InputError
    from gkd.report import read_runs, write_figures, write_report

    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out: {path} does not end in .html")
    data = read_runs(runs)
    try:
        write_report(data, path, gkd.__version__)
        written = [path]
        if png:
            try:
                written += write_figures(data, path)
            except ImportError:
                typer.echo("no pictures: matplotlib is missing (pip install 'gkd[plots]')", err=True)
    except OSError as error:
        raise InputError(f"--out: {error.filename or path}: {error.strerror}") from error
    for file in written:
        typer.echo(str(file))
