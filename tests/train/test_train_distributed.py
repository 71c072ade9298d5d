"""What joining a process group leaves behind in the process."""

from __future__ import annotations

import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from launching import run

from gkd.config import Launch
from gkd.errors import MachineError
from gkd.train.distributed import meet

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


@pytest.mark.fault
def test_a_meeting_point_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for name, value in (
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
        ):
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        with pytest.raises(MachineError, match=rf"rank 1 has not found .* says nothing; is 127\.0\.0\.1:{port} "):
            meet(Launch.from_environment(), timedelta(seconds=0.5))
        assert time.monotonic() - started < 5
