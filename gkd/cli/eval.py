"""gkd eval"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gkd.config import load_config


def eval_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, or its config.resolved.json.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    student: Annotated[str | None, typer.Option(help="Folder or hub name; default: the run's final/.")] = None,
) -> None:
    """Measure a student's held-out divergence from the teacher; prints one JSON object."""
    from gkd.train.evaluation import evaluate_student

    resolved = load_config(config, overrides or ())
    typer.echo(json.dumps(evaluate_student(resolved, student or str(resolved.run.folder / "final"))))
