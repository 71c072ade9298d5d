"""gkd author"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gkd.config import Launch
from gkd.errors import InputError


def author_command(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file of models and steps; see configs/recipes/ and docs/author.md.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE, such as models.teacher.model=FOLDER")
    ] = None,
    data: Annotated[
        str, typer.Option(help="Rows to start from, with any columns: JSONL, Parquet, a datasets folder, a hub name.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="New JSONL file for gkd train; beside it a card and a page.")] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Texts that no row may share a run of words with: such rows are dropped.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a datasets folder or hub name.")] = "train",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, rows and models; show the first question; ask nothing.")
    ] = False,
) -> None:
    """Let a model write training data: rationales, demonstrations, judged samples.

    A recipe names models, in this process or behind an OpenAI-compatible server, and the steps that every row goes
    through: ask, read, keep, distinct, sample, write.

    Every answer is kept: the same command goes on where it was stopped, by a signal, a spent budget (exit code 75) or a
    failure, and asks nothing twice.
    """
    from gkd.author import AuthorRun, Recipe, card_path, page_path

    if Launch.from_environment().world_size > 1:
        raise InputError("gkd author: is one process; start it without a launcher")
    if not data:
        raise InputError("gkd author: give --data FILE")
    if out is None and not dry_run:
        raise InputError("gkd author: give --out FILE")
    run = AuthorRun(Recipe.read(recipe, overrides or ()), data, out or Path("none.jsonl"), split=split, heldout=heldout)
    run.check()
    if dry_run:
        run.try_models()
        _show(run)
        return
    assert out is not None
    run.run()
    tally = run.made.tally
    typer.echo(f"{out}: {tally.written} rows of {tally.rows}; {card_path(out)}, {page_path(out)}")


def _show(run: object) -> None:
    from gkd.author import AuthorRun
    from gkd.monitor.text import clean

    assert isinstance(run, AuthorRun)
    for operator in run.recipe.operators:
        typer.echo(operator.where.rpartition(": ")[2])
    question = run.first_question()
    if question is not None:
        typer.echo(f"first question of {run.made.rows} rows:")
        prompt = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False, indent=1)
        typer.echo(clean(prompt))
