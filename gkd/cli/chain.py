"""gkd chain"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

import gkd
from gkd.config import Launch
from gkd.errors import InputError


def chain_command(
    file: Annotated[Path, typer.Argument(help="YAML file of stages; see configs/chains/ and docs/chains.md.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage's config, print what would run, in order.")
    ] = False,
) -> None:
    """Run several trainings and evaluations, and data that models write, each made of what those before it brought.

    A stage that is done is skipped as long as nothing that it is made of has changed, one that was interrupted goes
    on, and one that fails stops the chain: the same command goes on from there.
    """
    from gkd.chain import read_chain, run_chain

    if Launch.from_environment().world_size > 1:
        raise InputError("gkd chain: is one process; name the launcher in the file (launcher:), for each stage")
    chain = read_chain(file)
    if dry_run:
        for stage in chain.stages:
            after = f"   after {', '.join(stage.needs)}" if stage.needs else ""
            launcher = f"   under {stage.launcher}" if stage.launcher and stage.kind.name == "train" else ""
            typer.echo(f"{stage.name:<24} {stage.kind.name:<6} {stage.folder}{after}{launcher}")
        return
    run_chain(chain, lambda line: typer.echo(line, err=True))
    trained = [stage.folder for stage in chain.stages if stage.kind.name == "train"]
    if trained:
        from gkd.report import read_runs, write_report

        page = chain.folder / "report.html"
        write_report(read_runs(trained), page, gkd.__version__)
        typer.echo(str(page))
    typer.echo(f"every stage is done; their folders are in {shlex.quote(str(chain.folder))}")
