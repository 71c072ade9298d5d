"""What a run does on SIGUSR1 and SIGTERM, in training and before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from launching import environment

from gkd.errors import RunInterruptedError
from gkd.train.signals import TERMINATED, Signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_in_training_a_signal_is_only_remembered(number: signal.Signals) -> None:
    signals = Signals(grace_s=20)
    before = signal.getsignal(number)
    with signals.heeded(), signals.deferred():
        os.kill(os.getpid(), number)
        assert signals.is_seen
        signals.answered()
    assert signal.getsignal(number) == before


def test_before_and_after_it_ends_what_is_under_way() -> None:
    with pytest.raises(RunInterruptedError, match="--resume"), Signals(20).heeded():
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit, match=str(TERMINATED)), Signals(20).heeded():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.fault
def test_a_dead_peer_is_not_waited_for() -> None:
    """The main thread waits in C, as in a collective, and never hears of the signal."""
    script = (
        "import threading, ctypes\n"
        "from gkd.train.signals import Signals\n"
        "signals = Signals(1.0, lambda status, reason: print('ends with', status, flush=True))\n"
        "with signals.heeded(), signals.deferred():\n"
        "    print('there', flush=True)\n"
        "    while True:\n"
        "        ctypes.CDLL(None).sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(20) == TERMINATED
    assert 0.9 < time.monotonic() - started < 5
    assert process.stdout.read() == f"ends with {TERMINATED}\n"


@pytest.mark.fault
def test_a_signal_in_the_first_second_ends_cleanly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print('there', flush=True); import sys, gkd.cli.main as m; import time\n"
         "m.check_packages = lambda arguments: (print('heeds', flush=True), time.sleep(60))\n"
         "sys.argv = ['gkd', 'train', 'x.yaml']; m.main()"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    assert process.stdout.readline() == "heeds\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert process.stderr is not None and "SIGUSR1 before the run has begun" in process.stderr.read()
