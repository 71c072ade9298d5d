"""What joining a process group leaves behind in the process."""

from __future__ import annotations

import sys
from pathlib import Path

from launching import run

_PARENT_AND_CHILD = """
import subprocess, sys
from gkd.config import Launch
from gkd.train import distributed
distributed.initialize(Launch())
if len(sys.argv) == 1:
    sys.exit(subprocess.run([sys.executable, __file__, "child"]).returncode)
"""


def test_a_process_that_trains_can_start_another_that_does(tmp_path: Path) -> None:
    """A master address and port left in the environment would send the second to the first one's port."""
    script = tmp_path / "train.py"
    script.write_text(_PARENT_AND_CHILD)
    done = run([sys.executable, script])
    assert done.returncode == 0, done.stderr
