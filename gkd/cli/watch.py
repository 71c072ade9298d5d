"""gkd watch"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def watch_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    once: Annotated[bool, typer.Option("--once", help="Show how the run stands and leave.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the folder.")] = 1.0,
) -> None:
    """Watch a run that was started elsewhere, until it ends or Ctrl-C."""
    from gkd.monitor import make_console
    from gkd.report.watch import show_once, watch_run

    if once:
        show_once(run, make_console())
        return
    with suppress(KeyboardInterrupt):  # the usual way to leave
        watch_run(run, make_console(), interval_s=interval)
