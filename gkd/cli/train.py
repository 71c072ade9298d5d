"""gkd train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from gkd.config import Launch, load_config


def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/ and `gkd config`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. optim.lr=1e-4")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; the run that the folder holds moves to previous/ in it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that is cheap, print the config.")
    ] = False,
) -> None:
    """Distil a teacher into a student.

    One device: gkd train CONFIG. Several: torchrun --nproc_per_node 2 -m gkd train CONFIG, or
    deepspeed --num_gpus 2 --module gkd train CONFIG.
    """
    from gkd.train.distiller import Distiller

    distiller = Distiller(load_config(config, overrides or ()))
    if dry_run:
        for line in distiller.check(resume=resume):
            typer.echo(line, err=True)
        checked = distiller.settle(resume=resume).config
        typer.echo(yaml.safe_dump(checked.model_dump(mode="json"), sort_keys=False), nl=False)
        return
    summary = distiller.train(resume=resume, overwrite=overwrite)
    if Launch.from_environment().is_main:
        from gkd.monitor import make_console
        from gkd.monitor.summary_view import render_summary

        render_summary(summary, make_console())
    distiller.end_process()
