"""Bytes of what a run writes into its folder, from the same counts as its memory."""

from __future__ import annotations

from gkd.config import Config
from gkd.planning.memory import keeps_master_copy
from gkd.planning.models import DTYPE_BYTES
from gkd.planning.setup import Setup


def checkpoint_bytes(setup: Setup) -> float:
    """Of one checkpoint, all ranks' files: trained weights, Adam's two moments, and the optimizer's own copy."""
    weight = 2 if setup.half_weights else 4
    return setup.trained_parameters * (weight + 8 + (4 if keeps_master_copy(setup) else 0))


def result_bytes(setup: Setup) -> float:
    """Of `final/`, with a LoRA student's adapter."""
    return setup.student.parameters * DTYPE_BYTES[setup.student_dtype] + 4.0 * setup.adapter_parameters


def run_folder_bytes(config: Config, setup: Setup) -> float:
    """At most, at once: the checkpoints that are kept and one that is being written, and the result."""
    checkpoints = config.run.keep_checkpoints + 1 if config.run.save_every else 1  # one at a signal
    return checkpoints * checkpoint_bytes(setup) + result_bytes(setup)
