"""Process-wide settings that libraries read once, while they load. To be called before torch is imported."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress

from gkd.errors import MachineError, shown

_PR_SET_PDEATHSIG = 1  # of prctl(2)

_DEFAULTS = {
    # Threads that wait for one another sleep instead of spinning. Where any other process wants a core too, spinning
    # starves the very thread that is waited for: seen here, vLLM on 2 cores beside one busy process, 32 short
    # completions took more than 60 s spinning and 3 s sleeping. On idle cores the two are equally fast.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's CPU build warns of its memory binding at every start
    "TOKENIZERS_PARALLELISM": "false",  # this process forks nothing that tokenises
}


# What tells a process that it is one of several. DeepSpeed wants the rank on the machine also of a single one.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CXX_COMPILERS = ("c++", "g++", "clang++")  # any of them in PATH will do
_UNSAFE = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "vLLM takes pickles, which run code, from whoever reaches its processes",
    "VLLM_SERVER_DEV_MODE": "vLLM's servers have routes that no key guards, for any call and other weights",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "whoever reaches a server of vLLM's makes it load adapters",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch.load runs what code a file holds",
}
_SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}


def launch_number(name: str, default: int | None = None, *, least: int = 0) -> int:
    """A whole number that a launcher put into the environment. Raises MachineError, naming the variable."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal() and int(text) >= least):
        found = "is not set" if text is None else f"is {shown(text)}, no whole number from {least} on"
        raise MachineError(
            f"{name} {found}; torchrun, deepspeed and srun set it: start gkd with one, or unset them all"
        )
    return int(text)


def unsafe_switches() -> dict[str, str]:
    """Those that are on of the variables that let others run code here, each with how."""
    on = {name: os.environ.get(name, "0").strip().lower() for name in _UNSAFE}
    return {name: _UNSAFE[name] for name, value in on.items() if value not in ("", "0", "false", "no")}


def without_launcher() -> dict[str, str]:
    """The environment for a process that works alone, whatever started this one."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}


@contextmanager
def local_rank_taken_back() -> Generator[None]:
    """Takes LOCAL_RANK out of the environment at the end, if it was not there: without the rest of a launcher's
    variables it misleads what this process starts later."""
    was_there = "LOCAL_RANK" in os.environ
    try:
        yield
    finally:
        if not was_there:
            os.environ.pop("LOCAL_RANK", None)


def die_with_parent(parent_pid: int, number: int = signal.SIGKILL) -> None:
    """Linux sends this process that signal when the one that started it ends, however it does. Elsewhere it lives on.

    `parent_pid` is that one's own, as it may have ended already. The thread of it that started this process has to
    live as long as it does.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        os._exit(1)


def shell_status(returncode: int) -> int:
    """A child's return code as a shell tells it: 128 + the number of the signal that ended it."""
    return returncode if returncode >= 0 else 128 - returncode


def prepare_process() -> None:
    """Sets what the user has not set."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def adopt_slurm_launch() -> None:
    """Says in torchrun's variables what srun says in its own, if no launcher has spoken.

    Only inside a step of several tasks: in a batch script itself, Slurm's task variables describe what has not started.
    The main rank's address is that of the host that started the step, its port follows from the job; both can be set.
    Raises MachineError for variables of Slurm's that are no numbers.
    """
    variables = os.environ
    if "RANK" in variables or launch_number("SLURM_STEP_NUM_TASKS", 1) < 2:
        return
    numbers = {name: str(launch_number(slurm_name)) for name, slurm_name in _SLURM_NAMES.items()}
    variables.update(numbers)
    variables.setdefault("MASTER_ADDR", variables.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    variables.setdefault("MASTER_PORT", str(20000 + launch_number("SLURM_JOB_ID", 0) % 10000))
