"""gkd bench"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

import gkd
from gkd.errors import InputError

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

bench_app = typer.Typer(help="Benchmarks of the checkout that gkd is installed from.", no_args_is_help=True)


@bench_app.command("table", context_settings=_PASS_ON, add_help_option=False)
def table_command(context: typer.Context) -> None:
    """Compare ways to distil on checkable problems, as the GKD paper does; options go to benchmarks/gkd_table.py."""
    script = Path(gkd.__file__).parents[1] / "benchmarks" / "gkd_table.py"
    if not script.is_file():
        raise InputError(
            f"gkd bench: there is no {script}; the benchmarks are part of the repository, not of the package: "
            "clone it and run `pip install -e .` there"
        )
    os.execv(sys.executable, [sys.executable, str(script), *context.args])
