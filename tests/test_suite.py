"""What the suite does beside testing: it ends what a failed test started, and says what it skipped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import run_python

HANGS = """
import os, subprocess, sys, time
import pytest

ORPHAN = "sleep 300 & echo $! > {folder}/orphan"  # its parent is gone at once
CHILD = "import subprocess, sys; subprocess.run(['sh', '-c', 'echo $$ > {folder}/grandchild; sleep 300'])"

@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(["sh", "-c", "echo $$ > {folder}/server; exec sleep 300"])
    yield process
    process.kill()
    process.wait()

@pytest.mark.timeout(4)
def test_hangs(server):
    subprocess.run(["sh", "-c", ORPHAN], check=True)
    subprocess.run([sys.executable, "-c", CHILD])

def test_the_fixtures_process_is_left_alone(server):
    assert server.poll() is None
"""
SKIPS = """
import pytest

@pytest.mark.parametrize("index", range(3))
def test_skips(index):
    pytest.skip("needs a CUDA device")

def test_works(): pass

{more}
"""


def suite(folder: Path, text: str, *options: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(text)
    plugins = ["-p", "leftovers", "-p", "skips", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = run_python(
        ["-m", "pytest", "-q", "--rootdir", folder, folder, *plugins, *options], PYTHONPATH=str(Path(__file__).parent)
    )
    return done.returncode, done.stdout


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.fault
def test_what_a_hanging_test_started_is_ended_and_what_others_need_is_not(tmp_path: Path) -> None:
    code, said = suite(tmp_path, HANGS.replace("{folder}", str(tmp_path)))
    assert code == 1 and "Timeout" in said and "1 failed, 1 passed" in said
    until_s = time.monotonic() + 10
    pids = [int((tmp_path / name).read_text()) for name in ("orphan", "grandchild", "server")]
    while any(map(is_running, pids)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert [is_running(pid) for pid in pids] == [False] * 3


def test_skips_are_counted_by_reason_and_only_a_machines_own_pass_where_it_is_strict(tmp_path: Path) -> None:
    code, said = suite(tmp_path, SKIPS.format(more=""), "--strict-skips")
    assert code == 0 and "3 skipped ==" in said and "    3  needs a CUDA device\n" in said
    absent = "def test_absent(): pytest.importorskip('no_such_package')"
    code, said = suite(tmp_path, SKIPS.format(more=absent))
    assert code == 0 and "4 skipped ==" in said and "    1  could not import 'no_such_package'" in said
    code, said = suite(tmp_path, SKIPS.format(more=absent), "--strict-skips")
    assert code == 1 and "this machine could run \"could not import 'no_such_package'" in said
