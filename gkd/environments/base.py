"""What an environment is: it reads the student's turn, and says what the student reads next.

    class Dice(Environment):
        def reset(self, task): self._throws = random.Random(task.seed)
        def step(self, turn): return Observed(str(self._throws.randint(1, 6)), done="enough" in turn)

    class DiceKind(EnvironmentKind):
        def open(self): return Dice()

    register_environment("dice", DiceKind)        # gkd.plugins; in the config: environment: {kind: dice}

An observation is a function of the task and the turns: then a run is bitwise reproducible, a resume with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from gkd.schedules import CountSchedule, describe_schedule, largest, value_at
from gkd.schema import Section


class EnvironmentFailedError(Exception):
    """What went wrong in an environment, in words for its user. `is_temporary`: it may work later."""

    def __init__(self, message: str, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


@dataclass(frozen=True, slots=True)
class Task:
    """What a conversation is about."""

    prompt: str  # the last that the row's user says
    data: Any  # the row's `task`, as JSON holds it; None: it has none
    seed: int  # for what an environment draws; it depends on (run, step, prompt, sample)


@dataclass(frozen=True, slots=True)
class Observed:
    """What came of a turn. `done`: the conversation ends here, and nobody reads the observation."""

    observation: str
    done: bool = False
    reward: float | None = None  # of this turn; those of a conversation are added up


class Environment(ABC):
    """One conversation's; asked from one thread at a time, while those of other conversations are asked from others.

    A `step` that takes too long goes on in its thread, and nobody waits for it: `unfinished` and `close` are asked
    meanwhile.
    """

    @abstractmethod
    def reset(self, task: Task) -> None:
        """Before the first turn: what opens the conversation is the row's prompt."""

    @abstractmethod
    def step(self, turn: str) -> Observed:
        """`turn` is the student's text, without special tokens. It may be anything."""

    def unfinished(self) -> float | None:
        """What a conversation earns, beside its turns, that ends before this says that it is done; None: nothing, and
        it is not judged if no turn was."""
        return None

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """After the last turn, however the conversation ended."""


class EnvironmentKind(Section):
    """One kind, with its options as fields, as a config names it."""

    kind: str = Field(description="which environment: answer, calculator, text_game, http, or a plugin's")
    max_turns: CountSchedule = Field(4, description="turns that the student has; a number or a schedule")
    turn_tokens: int | None = Field(None, ge=1, description="longest turn; null = what rollout.max_new_tokens leaves")
    max_observation_tokens: int = Field(64, ge=1, description="what is read of an observation; the rest is cut off")
    timeout_s: float = Field(
        10.0, gt=0.0, le=86400.0, description="longest wait for an observation; then the conversation ends"
    )
    concurrency: int = Field(16, ge=1, description="conversations of one rank that wait for observations at once")
    role: Literal["user", "tool"] = Field("user", description="whose message an observation is to the chat template")
    check_prefix: bool = Field(
        True,
        description="stop where the chat template would write what was said otherwise than it was; false = keep what "
        "was sampled and go on",
    )

    def open(self) -> Environment:
        """For one conversation."""
        raise NotImplementedError

    def check_task(self, data: Any) -> None:
        """Raises ValueError for a row's `task` (None: it has none) that it cannot work with."""

    def check_ready(self) -> None:
        """Raises ConfigError where it cannot be opened now."""

    @property
    def answers_turns(self) -> bool:
        """Whether the student may read what it says of a turn, and go on."""
        return largest(self.max_turns) > 1

    def turns_at(self, step: int) -> int:
        return round(value_at(self.max_turns, step))

    def describe(self) -> str:
        """A few words for people."""
        return f"{self.kind}, turns: {describe_schedule(self.max_turns)}"
