"""gkd eval"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd.config import load_config
from gkd.errors import InputError, RunError
from gkd.evaluate.figures import AXES, Evaluation

_PIPED_WIDTH = 120


def eval_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, or its config.resolved.json.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    student: Annotated[str | None, typer.Option(help="Folder or hub name; default: the run's final/.")] = None,
    only: Annotated[str, typer.Option(help="Some of task,efficiency,compression.")] = ",".join(AXES),
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and eval.md; default: the run's.")] = None,
    output: Annotated[Literal["table", "json", "markdown"], typer.Option("--format", help="Of what is printed.")] = (
        "table"
    ),
) -> None:
    """Measure teacher, student before and student after side by side: task, efficiency, compression.

    Writes eval.json and eval.md, and prints a table; --format json prints one line of JSON, the same as eval.json.
    """
    axes = _axes(only)
    resolved = load_config(config, overrides or ())
    folder = out or resolved.run.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is a file; name a folder")
    from gkd.evaluate.evaluation import evaluate

    evaluation = evaluate(resolved, student=student, axes=axes)
    _print(evaluation, output)
    _write(evaluation, folder)
    if evaluation.is_empty:
        raise RunError("gkd eval: nothing could be measured; the reasons are above")


def _axes(only: str) -> Sequence[str]:
    axes = [name.strip() for name in only.split(",")]
    unknown = next((name for name in axes if name not in AXES), None)
    if unknown is not None:
        raise InputError(f"--only: unknown axis {unknown!r}; known: {', '.join(AXES)}")
    return axes


def _write(evaluation: Evaluation, folder: Path) -> None:
    from gkd.evaluate.report import markdown
    from gkd.files import write_atomically, write_json
    from gkd.run_files import RunFiles

    files = RunFiles(folder)
    try:
        write_json(files.evaluation, evaluation.as_json())
        write_atomically(files.evaluation_page, markdown(evaluation).encode())
    except OSError as error:
        raise RunError(f"--out: {error.filename}: {error.strerror}") from error


def _print(evaluation: Evaluation, output: str) -> None:
    from gkd.evaluate.report import markdown, render
    from gkd.monitor import make_console

    if output == "json":
        typer.echo(json.dumps(evaluation.as_json(), allow_nan=False))
    elif output == "markdown":
        typer.echo(markdown(evaluation))
    else:
        console = make_console()
        if not console.is_terminal:
            console.width = _PIPED_WIDTH
        render(evaluation, console)
