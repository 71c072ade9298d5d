"""The entry point: looks at what the command needs before it imports anything outside of gkd's core.

Only the standard library here, and what of gkd imports no more. The commands are in `gkd.cli.app`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import gkd
from gkd import extras
from gkd.environment import adopt_slurm_launch, prepare_process
from gkd.errors import GkdError, MissingPackageError, RunInterruptedError

# the extra that each command needs, in the order of the help
COMMANDS = {
    "init": "cli",
    "train": "train",
    "eval": "train",
    "chain": "train",
    "generate": "train",
    "export": "train",
    "author": "train",
    "serve-teacher": "train",
    "serve-sampler": "train",
    "serve-environment": "cli",
    "launch": "cli",
    "watch": "cli",
    "report": "cli",
    "plan": "cli",
    "shape": "train",
    "config": "cli",
    "doctor": "cli",
    "bench": "train",
}
SERVERS = ("serve-teacher", "serve-sampler")


def main() -> None:
    """Runs the command; a `GkdError` becomes one line on stderr and its exit code."""
    prepare_process()
    arguments = sys.argv[1:]
    if _command(arguments) == "train":
        signal.signal(signal.SIGUSR1, _stop_before_the_start)
    try:
        adopt_slurm_launch()
        if _answered_by_the_core(arguments):
            return
        check_packages(arguments)
        from gkd.cli.app import run

        run()
    except GkdError as error:
        _say(error)
        sys.exit(error.exit_code)


def _stop_before_the_start(number: int, frame: object) -> None:
    """Nothing has begun that would have to be cleaned up, and an exception in the middle of an import can crash."""
    del number, frame
    os.write(2, b"gkd: SIGUSR1 before the run has begun\n")
    os._exit(RunInterruptedError.exit_code)


def check_packages(arguments: Sequence[str]) -> None:
    """Raises MissingPackageError if the command that they name needs what is not installed."""
    command = _command(arguments)
    what = f"gkd {command}" if command else "gkd"
    if command in SERVERS and "--help" not in arguments:
        extras.require_vllm(what)
    extras.require(what, COMMANDS.get(command, "cli"))


def _command(arguments: Sequence[str]) -> str:
    """The first argument that is one: a launcher may have put options before it."""
    return next((argument for argument in arguments if argument in COMMANDS), "")


def _answered_by_the_core(arguments: Sequence[str]) -> bool:
    """Whether only the core is installed and the question was `gkd`, `gkd --help` or `gkd --version`."""
    if arguments not in ([], ["--help"], ["--version"]):
        return False
    try:
        extras.require("gkd", "cli")
    except MissingPackageError as error:
        if arguments == ["--version"]:
            print(f"gkd {gkd.__version__}")
        else:
            needs = "\n".join(f"  gkd {command:<14} gkd[{extra}]" for command, extra in COMMANDS.items())
            print(f"{error}\n\nThe losses are there: import gkd. The commands, and the extra that each needs:\n{needs}")
        return True
    return False


def _say(error: GkdError) -> None:
    """On stderr. What is wrong with the input is wrong on all ranks of a machine, and said once."""
    rank, local_rank = (_number_or_0(os.environ.get(name, "")) for name in ("RANK", "LOCAL_RANK"))
    if local_rank == 0 or error.exit_code != 2:
        sys.stdout.flush()
        where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        who = f" rank {rank}:" if rank else ""
        print(f"gkd:{who} {type(error).__name__}: {error}{where}", file=sys.stderr, flush=True)


def _number_or_0(text: str) -> int:
    """What is no number is what the error is about."""
    return int(text) if text.isdecimal() else 0
