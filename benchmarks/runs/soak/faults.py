"""The faults of a soak, drawn from a seed, and what the documents tell a user to do after each."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.runs.soak.world import SERVERS, TIMEOUT_S, SoakError, World, announce

STOPPED, DONE = 75, 0  # exit codes: saved, goes on with --resume; at the end of its steps
_FULL = ("No space left on device", "the disk is full")


@dataclass(frozen=True)
class Fault:
    """At a step of the run, or `seconds` after the start that it makes; how long it lasts."""

    kind: str
    step: int
    seconds: float


def drawn(seed: int, count: int, steps: int, kinds: Sequence[str]) -> list[Fault]:
    """Every kind before one comes again, at steps that are not the same; the first and the last tenth are left out."""
    rng = random.Random(seed)
    places = sorted(rng.sample(range(max(1, steps // 10), steps - steps // 10), count))
    order: list[str] = []
    while len(order) < count:
        order += rng.sample(list(kinds), len(kinds))
    return [Fault(kind, step, round(rng.uniform(0.2, 8.0), 2)) for kind, step in zip(order, places, strict=False)]


def _signalled(number: signal.Signals, codes: tuple[int, ...]) -> Callable[[World, Fault], None]:
    def fault(world: World, _: Fault) -> None:
        trainer = world.running["trainer"]
        trainer.popen.send_signal(number)
        code = trainer.wait(number.name)
        if code not in codes:
            raise SoakError(f"the trainer ended with {code} on {number.name}, not with {codes}\n{trainer.last_words()}")

    return fault


def _killed_while_it_starts(world: World, fault: Fault) -> None:
    """The trainer, killed, begun again, and killed once more at any moment of its start."""
    _signalled(signal.SIGKILL, (-signal.SIGKILL,))(world, fault)
    world.start_trainer(resume=True)
    time.sleep(fault.seconds)
    _signalled(signal.SIGKILL, (-signal.SIGKILL, DONE))(world, fault)


def _stopped(kind: str) -> Callable[[World, Fault], None]:
    def fault(world: World, fault: Fault) -> None:
        world.running[kind].popen.send_signal(signal.SIGSTOP)
        time.sleep(fault.seconds)
        world.running[kind].popen.send_signal(signal.SIGCONT)

    return fault


def _restarted(kind: str, number: signal.Signals) -> Callable[[World, Fault], None]:
    def fault(world: World, fault: Fault) -> None:
        server = world.running[kind]
        server.popen.send_signal(number)
        code = server.wait(number.name)
        if number == signal.SIGTERM and code != 0:
            raise SoakError(f"{kind} ended with {code} on SIGTERM\n{server.last_words()}")
        world.start_server(kind)
        world.wait_until_ready(kind)

    return fault


def _away(kind: str) -> Callable[[World, Fault], None]:
    """For longer than it is waited for."""

    def fault(world: World, fault: Fault) -> None:
        world.running[kind].popen.kill()
        world.running[kind].wait("SIGKILL")
        code = world.running["trainer"].wait(f"the {kind} stayed away")
        if code not in (STOPPED, DONE):
            raise SoakError(
                f"the trainer ended with {code} without its {kind}\n{world.running['trainer'].last_words()}"
            )
        world.start_server(kind)
        world.wait_until_ready(kind)

    return fault


def _full_disk(world: World, fault: Fault) -> None:
    """Until the trainer has ended over it, in one line that says so."""
    world.fill_disk(leave_bytes=int(fault.seconds * (1 << 14)))
    trainer = world.running["trainer"]
    code = trainer.wait("the disk was full")
    words = trainer.last_words()
    world.free_disk()
    if code == DONE:
        raise SoakError("the trainer finished on a full disk")
    if "Traceback" in words or not any(text in words for text in _FULL):
        raise SoakError(f"the trainer ended with {code} on a full disk, and does not say so in one line\n{words}")


FAULTS: dict[str, Callable[[World, Fault], None]] = {
    "trainer killed": _signalled(signal.SIGKILL, (-signal.SIGKILL,)),
    "trainer killed while it starts": _killed_while_it_starts,
    "SIGTERM to the trainer": _signalled(signal.SIGTERM, (STOPPED, DONE)),
    "SIGUSR1 to the trainer": _signalled(signal.SIGUSR1, (STOPPED, DONE)),
    "trainer stopped for a while": _stopped("trainer"),
    **{f"{kind} killed, and back": _restarted(kind, signal.SIGKILL) for kind in SERVERS},
    **{f"SIGTERM to the {kind}, and back": _restarted(kind, signal.SIGTERM) for kind in SERVERS},
    **{f"{kind} stopped for up to 8 s (time limit {TIMEOUT_S} s)": _stopped(kind) for kind in SERVERS},
    **{f"{kind} away for longer than it is waited for": _away(kind) for kind in SERVERS},
    "disk full": _full_disk,
}


def disturbed(world: World, faults: Sequence[Fault], note: Callable[[Fault | None, int], None]) -> None:
    """A whole run, with these faults. `note` is told of each resume: its fault, if one was planned, and the steps that
    have to be done again. Raises SoakError for what must not happen."""
    waiting = list(faults)
    world.start_trainer(resume=False)
    while True:
        trainer, cause = world.running["trainer"], None
        if waiting:
            due = waiting[0]
            if world.wait_for_step(due.step):
                cause = waiting.pop(0)
                announce(f"step {world.steps_logged()}: {cause.kind} ({cause.seconds} s)")
                FAULTS[cause.kind](world, cause)
        else:
            trainer.wait("the last fault", patience_s=math.inf)
        trainer = world.running["trainer"]
        if trainer.popen.poll() is None:
            continue
        if trainer.popen.returncode == DONE:
            return
        _resume(world, cause, note)


def _resume(world: World, cause: Fault | None, note: Callable[[Fault | None, int], None]) -> None:
    ended = world.running["trainer"]
    if cause is None and ended.popen.returncode not in (STOPPED, 1):
        raise SoakError(f"the trainer ended with {ended.popen.returncode} by itself\n{ended.last_words()}")
    done = world.steps_logged()
    world.start_trainer(resume=True)
    trainer = world.running["trainer"]
    world.wait_for(
        lambda: "resumed at step" in (text := trainer.log.read_text()) or "begins again" in text, "a resume", trainer
    )
    note(cause, done - world.resumed_at())
