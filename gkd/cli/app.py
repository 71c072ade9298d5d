"""The command line. One small file a command; nothing heavy is imported until a command needs it."""

from __future__ import annotations

import logging

import typer

import gkd
from gkd.cli.author import author_command
from gkd.cli.bench import bench_app
from gkd.cli.chain import chain_command
from gkd.cli.config import config_command
from gkd.cli.doctor import doctor_command
from gkd.cli.eval import eval_command
from gkd.cli.export import export_command
from gkd.cli.generate import generate_command
from gkd.cli.init import init_command
from gkd.cli.launch import launch_command
from gkd.cli.plan import plan_command
from gkd.cli.report import report_command
from gkd.cli.serve_environment import serve_environment_command
from gkd.cli.serve_sampler import serve_sampler_command
from gkd.cli.serve_teacher import serve_teacher_command
from gkd.cli.shape import shape_command
from gkd.cli.train import train_command
from gkd.cli.watch import watch_command
from gkd.config import Launch
from gkd.errors import MachineError
from gkd.system_errors import system_errors

app = typer.Typer(
    name="gkd",
    help="On-policy and generalized knowledge distillation of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("init")(init_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("chain")(chain_command)
app.command("generate")(generate_command)
app.command("export")(export_command)
app.command("author")(author_command)
app.command("serve-teacher")(serve_teacher_command)
app.command("serve-sampler")(serve_sampler_command)
app.command("serve-environment")(serve_environment_command)
app.command("launch")(launch_command)
app.command("watch")(watch_command)
app.command("report")(report_command)
app.command("plan")(plan_command)
app.command("shape")(shape_command)
app.command("config")(config_command)
app.command("doctor")(doctor_command)
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gkd {gkd.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True),
) -> None:
    del version, local_rank  # the deepspeed launcher puts --local_rank before the command; LOCAL_RANK says the same


def run() -> None:
    """Runs the command of `sys.argv`. Raises a `GkdError`, or SystemExit."""
    launch = Launch.from_environment()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gkd").setLevel(logging.INFO if launch.is_main else logging.WARNING)
    with system_errors(MachineError):
        app()
