"""gkd doctor"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gkd.config import load_config
from gkd.errors import MachineError


def doctor_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run, whose folder is looked at, too.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Try out what a run needs of this machine: packages, disk, folders, shared memory, loopback, switches.

    A warning stops some runs, a fault all of them: then the exit code is 2.
    """
    from gkd.doctor import examine

    findings = list(examine(load_config(config, overrides or ()) if config is not None else None))
    for finding in findings:
        typer.echo(f"{finding.level:<8} {finding.what}: {finding.text}")
    faults = [finding.what for finding in findings if finding.level == "fault"]
    if faults:
        raise MachineError(f"gkd doctor: {', '.join(faults)}: see above")
