"""gkd shape"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gkd.errors import InputError

if TYPE_CHECKING:
    from gkd.shape.candidates import Candidate, Candidates
    from gkd.shape.search import Asked


def shape_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; what it says of student.init gives way.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    share: Annotated[str, typer.Option(help="Of the teacher's parameters, LOW..HIGH.")] = "0.05..0.5",
    widths: Annotated[
        str,
        typer.Option(
            help="heads: they go with the width; geometric: channels and neurons shrink by the square root of 1/2 at a "
            "time, heads stay; both; none: numbers of layers alone."
        ),
    ] = "both",
    candidates: Annotated[
        int, typer.Option(min=0, help="How many are made and measured, far apart in size and shape; 0: plans alone.")
    ] = 8,
    probe_steps: Annotated[int, typer.Option(min=0, help="Steps of the run that each is trained for.")] = 8,
    gpu: Annotated[str, typer.Option(help="Latency and memory are of it: h100, h200, a100-80, b200, l40s, cpu.")] = (
        "h100"
    ),
    pick: Annotated[
        str | None, typer.Option(help="The candidate that --out takes, by its name. Default: the suggested one.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Results, shape.json, shape.md and shape.png.")] = Path("runs/shape"),
    out: Annotated[Path | None, typer.Option(help="Write the config with the chosen student.")] = None,
) -> None:
    """Say which student to cut out of the config's teacher: how small, how deep, how wide.

    Sizes within --share are planned; some of them are cut, and trained for a few steps. Started again, the same command
    goes on where it was cut off.
    """
    from gkd.planning.devices import device_named
    from gkd.shape.candidates import candidates_of, families_named, parse_share
    from gkd.shape.search import Asked, shape

    limits, device, families = parse_share(share), device_named(gpu), families_named(widths)
    _check_out(out, measures=candidates > 0 or pick is not None)
    asked = Asked.read(config, overrides or (), folder, probe_steps)
    found = candidates_of(asked.source, families, revision=asked.config.teacher.revision)
    picked = None if pick is None else found.named(pick)
    made = shape(asked, limits, found, count=candidates, picked=picked, device=device, say=typer.echo)
    record = {"command": shlex.join(["gkd", *sys.argv[1:]]), **made}
    _keep(record, folder)
    if out is not None:
        _write_chosen(asked, record, picked, found, out)


def _check_out(out: Path | None, *, measures: bool) -> None:
    if out is None:
        return
    if out.exists():
        raise InputError(f"--out: {out} is there already")
    if not out.parent.is_dir():
        raise InputError(f"--out: there is no folder {out.parent}")
    if not measures:
        raise InputError("--out: nothing is measured with --candidates 0; --pick NAME says which student")


def _keep(record: dict[str, Any], folder: Path) -> None:
    """In the folder, and as a table in the terminal."""
    from gkd.files import write_atomically, write_json
    from gkd.monitor import make_console
    from gkd.shape import show

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "shape.json", record)
    write_atomically(folder / "shape.md", show.markdown(record).encode())
    show.render(record, make_console())
    try:
        show.plot(record, folder / "shape.png")
    except ImportError:
        typer.echo("no plot: it needs matplotlib; run `pip install 'gkd[plots]'`")
    typer.echo(f"written: {folder}/shape.json and what else is there")


def _write_chosen(asked: Asked, record: dict[str, Any], picked: Candidate | None, found: Candidates, out: Path) -> None:
    from gkd.shape.front import knee, pareto
    from gkd.shape.rewritten import write_with

    if picked is None:
        bend = knee(pareto(record["candidates"]))
        if bend is None:
            raise InputError("--out: every candidate failed; shape.json says why. --pick NAME takes one all the same")
        picked = found.named(bend["name"])
    kept = write_with(asked.file, [*asked.overrides, asked.init_override(picked)], out)
    lost = "" if kept else ", without comments: the file has what cannot be edited in place"
    typer.echo(f"{out} is written: {picked.name}{lost}; next: gkd train {shlex.quote(str(out))} --dry-run")
