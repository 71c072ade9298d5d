"""gkd bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gkd.errors import InputError

bench_app = typer.Typer(help="Experiments that need nothing but gkd.", no_args_is_help=True)


@bench_app.command("table")
def table_command(
    size: Annotated[str, typer.Option(help="smoke (does it work, in a minute; no figures), cpu or gpu.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    folder: Annotated[Path, typer.Option(help="What is made on the way.")] = Path("runs/gkd_table"),
    out: Annotated[Path | None, typer.Option(help="The JSON; a CSV goes beside it. Default: in the folder.")] = None,
    so_far: Annotated[bool, typer.Option("--so-far", help="Run nothing; show what is finished.")] = False,
) -> None:
    """Compare SFT, SeqKD, supervised KD and GKD on checkable tasks, as the GKD paper does, with tiny models made here.

    Started again, the same command goes on where it was cut off. The cpu size takes an hour on two cores; the gpu size
    has not been run yet.
    """
    if out is not None and out.suffix != ".json":
        raise InputError(f"--out: {out} does not end in .json")
    from gkd.bench.sizes import size_named
    from gkd.bench.table import make_table

    make_table(size_named(size), workers=workers, folder=folder, out=out, so_far=so_far, say=typer.echo)
