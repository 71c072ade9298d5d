"""Training from a program of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import MakeConfig, check, run

_SCRIPT = """
import os, sys
from gkd import Distiller
from gkd.config import load_config
from gkd.environment import LAUNCHER_VARIABLES
Distiller(load_config(sys.argv[1])).train()
left = [name for name in LAUNCHER_VARIABLES if name in os.environ]
assert not left, left
"""


@pytest.mark.slow
def test_training_leaves_no_launchers_variables(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """What the program starts next would take itself for a rank."""
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    check(run([sys.executable, script, make_run_config("alone", run={"steps": 1})]))
