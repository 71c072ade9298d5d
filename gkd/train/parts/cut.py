"""The student that is made of some of a model's layers: which ones, and where that is kept."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkd.config import Config, Launch, StudentInit, cache_folder
from gkd.digests import digest
from gkd.files import write_json
from gkd.models import (
    LayerChoice,
    choose_by_measure,
    local_folder,
    make_student_from_layers,
    model_fingerprint,
    recorded_choice,
)
from gkd.train.distributed import barrier, compute_device
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, source_revision

_log = logging.getLogger(__name__)
_KEY = "student.init"


def make_student(config: Config, models: Models, prompts: Prompts, launch: Launch) -> None:
    """Cuts the student from layers, where the config says so. Raises ModelError. Collective; the main rank does it."""
    init = config.student.init
    if init is not None and launch.is_main:
        source = local_folder(models.student_source, revision=source_revision(config), key=_KEY)
        if init.is_measured:
            _make_measured(config, init, source, models.student_path, prompts, launch)
        else:
            make_student_from_layers(source, init.layers, models.student_path)
    barrier()


def _make_measured(
    config: Config, init: StudentInit, source: Path, target: str, prompts: Prompts, launch: Launch
) -> None:
    rule = {
        "choose": init.choose,
        "count": init.count,
        "calibration_tokens": init.calibration_tokens,
        "dtype": config.student.dtype,
        "source_fingerprint": model_fingerprint(source, key=_KEY),
    }
    choice = recorded_choice(Path(target), rule)  # of a run that goes on: even if the cache is gone
    if choice is None:
        choice = _choice(rule, source, prompts.calibration, launch)
    _log.info(
        "%s keeps layers %s of %d: %.3f nats a token from the whole model, on %d tokens of data.train's prompts",
        init.choose, list(choice.layers), len(choice.layers) + len(choice.removed), choice.forward_kl,
        init.calibration_tokens,
    )  # fmt: skip
    make_student_from_layers(source, choice.layers, target, chosen={**rule, **choice.as_record()})


def _choice(rule: dict[str, Any], source: Path, texts: Sequence[tuple[int, ...]], launch: Launch) -> LayerChoice:
    """From the cache, or measured now."""
    numbers = [array("q", (len(ids), *ids)) for ids in texts]
    file = cache_folder() / "cuts" / f"{digest(json.dumps(rule, sort_keys=True).encode(), *numbers).hex()}.json"
    try:
        return LayerChoice.from_record(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # never measured, or damaged
        pass
    device = compute_device(launch)
    choice = choose_by_measure(
        source, rule["choose"], rule["count"], texts, dtype=rule["dtype"], device=device, key=_KEY
    )
    write_json(file, choice.as_record())
    return choice
