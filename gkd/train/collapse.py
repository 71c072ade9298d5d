"""A student that comes apart: its texts grow until they are cut off, repeat themselves, or become one and the same.

Trained on its own texts alone, a student can come to write ones on which it agrees with its teacher because nothing new
is said in them (length inflation: arXiv 2604.08527). Its loss falls meanwhile, so that something else has to be
watched. All of it goes by what is logged, which is the same on all ranks.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gkd.config import CollapseConfig
from gkd.errors import CheckpointError

_log = logging.getLogger(__name__)
_FILE = "collapse.json"  # of a checkpoint
LENGTH, TRUNCATED, REPEATED = "samples/mean_tokens", "samples/truncated_share", "samples/repeated_share"
ENTROPY, TEACHER_ENTROPY = "entropy/student", "entropy/teacher"
ROOM = "room"  # tokens that the step's texts may have, which a schedule may change; no metric
_FOLLOWED = (LENGTH, TRUNCATED, REPEATED, ENTROPY, TEACHER_ENTROPY)
_WARNED_AFTER = 4  # a sign is said when it has held for one in so many of the steps that a collapse takes
_MORE_TRUNCATED = 0.2  # of the texts than at the start: where texts are to be short, most of them are always cut off
_AS_SURE = 0.5  # of its teacher's entropy: a student that is hardly surer than that is no worse for it


@dataclass(frozen=True)
class Seen:
    """Means over a step's global batch, and over the first steps; NaN of what is not known, which is no sign."""

    now: Mapping[str, float]
    first: Mapping[str, float]

    def change(self, name: str) -> float:
        """Times of what it was at first."""
        first = self.first.get(name, math.nan)
        return self.now.get(name, math.nan) / first if first else math.nan

    @property
    def lengthening(self) -> float:
        """Times that texts are as long as at first, and beyond what they were given more room."""
        return self.change(LENGTH) / max(1.0, self.change(ROOM))


@dataclass(frozen=True)
class Sign:
    """`needs`: a step without these says nothing. `is_collapse`: a run may end on it. `is_warned_of`: before that."""

    name: str
    needs: tuple[str, ...]
    holds: Callable[[Seen, CollapseConfig], bool]
    says: Callable[[Seen, CollapseConfig], str]
    helps: str
    is_collapse: bool = False
    is_warned_of: bool = True


def _is_longer(seen: Seen, limits: CollapseConfig) -> bool:
    return seen.lengthening > limits.length_ratio


def _is_cut_off(seen: Seen, limits: CollapseConfig) -> bool:
    return seen.now[TRUNCATED] > limits.truncated_share


def _is_sure(seen: Seen, limits: CollapseConfig) -> bool:
    """Beside a teacher that is as sure of itself, a student has learned what it should."""
    is_like_teacher = seen.now[ENTROPY] > _AS_SURE * seen.now.get(TEACHER_ENTROPY, math.inf)
    return seen.change(ENTROPY) < limits.entropy_ratio and not is_like_teacher


def _says_length(seen: Seen, limits: CollapseConfig) -> str:
    room = " for the room that they have" if seen.change(ROOM) > 1.0 else ""
    return (
        f"the student's samples have {seen.now[LENGTH]:.0f} tokens on average, {seen.lengthening:.1f} times those "
        f"of the first {limits.first_steps} steps{room}"
    )


def _says_truncated(seen: Seen, limits: CollapseConfig) -> str:
    return (
        f"{seen.now[TRUNCATED]:.0%} of the student's samples were cut off before an end token, "
        f"{seen.first[TRUNCATED]:.0%} in the first {limits.first_steps} steps"
    )


def _says_entropy(seen: Seen, limits: CollapseConfig) -> str:
    teacher = f", and its teacher's {seen.now[TEACHER_ENTROPY]:.2g}" if TEACHER_ENTROPY in seen.now else ""
    return (
        f"the student's entropy is {seen.now[ENTROPY]:.2g} nats, {seen.change(ENTROPY):.0%} of that of the first "
        f"{limits.first_steps} steps{teacher}"
    )


_MORE_TEACHER = "give the teacher's texts a share (mixture.teacher), add a term of kind reference_kl, or lower optim.lr"
SIGNS = (
    Sign(
        "cut off and long",
        (LENGTH, TRUNCATED),
        lambda seen, limits: _is_longer(seen, limits) and _is_cut_off(seen, limits),
        lambda seen, limits: f"{_says_length(seen, limits)}, and {_says_truncated(seen, limits)}",
        _MORE_TEACHER,
        is_collapse=True,
        is_warned_of=False,  # both halves are
    ),
    Sign(
        "sure",
        (ENTROPY,),
        _is_sure,
        _says_entropy,
        "use a divergence that covers the teacher (forward_kl, or jsd with a smaller beta), or lower optim.lr",
        is_collapse=True,
    ),
    Sign(
        "cut off",
        (TRUNCATED,),
        lambda seen, limits: (
            _is_cut_off(seen, limits)
            and seen.now[TRUNCATED] - seen.first.get(TRUNCATED, math.nan) > _MORE_TRUNCATED
        ),
        _says_truncated,
        f"raise rollout.max_new_tokens if texts need more room, else {_MORE_TEACHER}",
    ),
    Sign("long", (LENGTH,), _is_longer, _says_length, _MORE_TEACHER),
    Sign(
        "repeats itself",
        (REPEATED,),
        lambda seen, limits: seen.now[REPEATED] > limits.repeated_share,
        lambda seen, _: (
            f"{seen.now[REPEATED]:.0%} of the 4-grams in the student's samples stood in the same text before"
        ),
        _MORE_TEACHER,
    ),
)  # fmt: skip


class CollapseWatch:
    """Implements `HasState`. Warns of a sign once it has held for a while, and says when a collapse has held for
    `limits.steps` steps together."""

    def __init__(
        self, limits: CollapseConfig, *, is_main: bool, room: Callable[[int], float] = lambda step: 1.0
    ) -> None:
        """`room`: of a step, what its texts may have; only how it changes counts."""
        self._limits, self._is_main, self._room = limits, is_main, room
        self._step: dict[str, float] = {}  # what was logged of the step so far
        self._sums: dict[str, tuple[int, float]] = {}  # of the first steps: how many, and their sum
        self._held: dict[str, int] = {}  # steps together, by the sign's name
        self._warned: set[str] = set()

    def observe(self, metrics: Mapping[str, object]) -> None:
        """Of what is logged of a step, in any parts."""
        for name in _FOLLOWED:
            value = metrics.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._step[name] = value

    def judge(self, steps_done: int) -> str | None:
        """Ends the step. What a collapse is known by, or None."""
        if LENGTH in self._step:
            self._step[ROOM] = self._room(steps_done - 1)
        seen = Seen(self._step, self._first())
        self._step = {}
        reason = None
        for sign in SIGNS:
            if any(name not in seen.now for name in sign.needs):
                continue  # as in a step that samples nothing
            held = self._held[sign.name] = self._held.get(sign.name, 0) + 1 if sign.holds(seen, self._limits) else 0
            if sign.is_warned_of and held >= max(1, self._limits.steps // _WARNED_AFTER):
                self._warn(sign, seen, steps_done)
            if sign.is_collapse and held >= self._limits.steps:
                reason = reason or f"{sign.says(seen, self._limits)}, for {held} steps; {sign.helps}"
        self._remember(seen.now)
        return reason

    def _first(self) -> dict[str, float]:
        """Of what was there in as many steps as make the beginning."""
        return {name: total / count for name, (count, total) in self._sums.items() if count >= self._limits.first_steps}

    def _remember(self, now: Mapping[str, float]) -> None:
        for name, value in now.items():
            count, total = self._sums.get(name, (0, 0.0))
            if count < self._limits.first_steps:
                self._sums[name] = (count + 1, total + value)

    def _warn(self, sign: Sign, seen: Seen, steps_done: int) -> None:
        if sign.name in self._warned:
            return
        self._warned.add(sign.name)
        if self._is_main:
            _log.warning("step %d: %s; %s (said once)", steps_done, sign.says(seen, self._limits), sign.helps)

    def save_state(self, folder: str) -> None:
        if self._is_main:
            state = {"sums": self._sums, "held": self._held, "warned": sorted(self._warned)}
            (Path(folder) / _FILE).write_text(json.dumps(state), encoding="utf-8")

    def load_state(self, folder: str) -> None:
        """Raises CheckpointError if the checkpoint does not have it."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no {_FILE}, what the run was like at its start")
        state = json.loads(path.read_text(encoding="utf-8"))
        self._sums = {name: (count, total) for name, (count, total) in state["sums"].items()}
        self._held, self._warned = state["held"], set(state["warned"])
