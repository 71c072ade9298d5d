"""gkd generate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd.config import DtypeOrAuto, settled_option
from gkd.errors import InputError
from gkd.extras import require_vllm
from gkd.system_errors import writing_into


def generate_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or wheel:<distribution>.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="User message; repeatable.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts in a file, in any format of the training data.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here instead of text to the terminal.")] = None,
    engine: Annotated[Literal["vllm", "transformers"], typer.Option(help="Sampler.")] = "vllm",
    dtype: Annotated[DtypeOrAuto, typer.Option(help="auto: bfloat16 where it is fast, else float32.")] = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 = off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 = off.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Completions a prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Sample a model's answers."""
    if not prompt and file is None:
        raise InputError("gkd generate: give --prompt TEXT or --file FILE")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out: there is no folder {out.parent}")
    if engine == "vllm":
        require_vllm("gkd generate", "or add --engine transformers")
    from gkd.evaluate.generation import generate_answers
    from gkd.monitor.text import clean
    from gkd.types import SamplingSettings

    answers = generate_answers(
        model,
        messages=prompt or [],
        file=file,
        engine=engine,
        dtype=settled_option(dtype),
        settings=SamplingSettings(max_new_tokens, temperature, top_p, top_k),
        samples=samples,
        seed=seed,
    )
    if out is not None:
        with writing_into(out):
            out.write_text("".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8")
        return
    for answer in answers:  # a model's words must not act on the terminal
        typer.echo(f"> {clean(str(answer['prompt']))}\n{clean(str(answer['completion']))}\n")
