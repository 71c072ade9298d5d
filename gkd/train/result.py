"""What a run leaves behind: its summary, and the student as a model folder."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gkd.config import Config
from gkd.models import ModelCard, Probe, Quantization, save_final
from gkd.monitor import HeldoutSample, RunSummary, loss_curve, time_totals
from gkd.run_files import RunFiles
from gkd.train.engine import StudentEngine
from gkd.train.run_folder import library_versions
from gkd.train.snapshots import Snapshot


def summarise(
    config: Config,
    files: RunFiles,
    *,
    records: Sequence[Mapping[str, Any]],
    before: Snapshot,
    after: Snapshot,
    shown: Sequence[tuple[str, str]],
    wall_s: float,
) -> RunSummary:
    """`records` are those of all steps, `shown` is (prompt, the teacher's answer) of each answer of the snapshots."""
    gkd = _command()
    answers = zip(shown, before.answers, after.answers, strict=False)  # none on a rank that is not main
    return RunSummary(
        name=config.run.name,
        steps=config.run.steps,
        wall_s=wall_s,
        heldout={
            name.replace("/", "_"): (before.heldout[name], value)
            for name, value in after.heldout.items()
            if name in before.heldout
        },
        time_s=time_totals(records),
        samples=tuple(HeldoutSample(*texts, *own) for texts, *own in answers),
        losses=loss_curve(records),
        final_folder=str(files.final),
        next_commands=(
            shlex.join([gkd, "generate", str(files.final), "--prompt", "List three uses for a paper clip."]),
            shlex.join([gkd, "eval", str(files.config), "--student", str(files.final)]),
            shlex.join(["less", str(files.samples)]),
            shlex.join([gkd, "init", _model_of_teacher(config), "your_prompts.jsonl", "--student", "your_student"]),
        ),
    )


def export(
    config: Config,
    folder: Path,
    student: StudentEngine,
    *,
    origin: str,
    probe_ids: Sequence[int],
    tolerance: float,
    end_token_ids: Sequence[int],
    is_main: bool,
) -> None:
    """The student into `folder`, with what else its model needs from the folder `origin`, proven by a probe. Its card
    tells no measurements yet.

    Every rank scores and streams, as gathering is collective; the main rank writes and proves.
    """
    probe = Probe(probe_ids, student.token_logprobs(probe_ids, 1), tolerance)
    weights, adapter, scales = student.whole_weights(), student.adapter_weights(), student.weight_scales()
    if not is_main:
        for _ in itertools.chain(scales, weights, adapter):
            pass
        return
    quantize = config.student.quantize
    save_final(
        folder,
        weights,
        origin,
        config.student.dtype,
        model_card(config),
        probe=probe,
        adapter=adapter,
        quantization=None if quantize is None else Quantization.of(quantize, getattr(torch, config.student.dtype)),
        scales=scales,
        end_token_ids=end_token_ids,
    )


def model_card(config: Config, heldout: Mapping[str, tuple[float, float]] | None = None) -> ModelCard:
    """`heldout` is (before, after) of each measure."""
    return ModelCard(
        teacher=", ".join(teacher.described for teacher in config.teachers.values()),
        student=_made_from(config),
        objective=config.objective.model_dump(mode="json"),
        objective_text=config.objective.describe(),
        mixture=config.mixture.model_dump(mode="json"),
        data=config.data.train,
        steps=config.run.steps,
        versions=library_versions(),
        lora=config.student.lora,
        heldout=heldout or {},
    )


def resume_command(files: RunFiles) -> str:
    """For a shell."""
    return shlex.join([_command(), "train", str(files.config), "--resume"])


def _made_from(config: Config) -> str:
    model = config.student.model or config.teacher.model
    return model if config.student.init is None else f"{model}: {config.student.init.describe()}"


def _command() -> str:
    """What a shell takes for gkd: its path, where the virtual environment is not active."""
    if shutil.which("gkd"):
        return "gkd"
    path = Path(sys.executable).parent / "gkd"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _model_of_teacher(config: Config) -> str:
    own = config.student.model if config.teacher.is_student else None
    return own or config.teacher.model
