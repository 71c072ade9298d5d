"""Conversations of the student with an environment: a turn, an observation, a turn.

They go on in rounds: all that are open sample a turn together, then their environments are asked, `concurrency` at a
time. A turn's seed derives from its conversation's and its number, so with a sampler that is bitwise reproducible, and
environments that are functions of task and turns, a conversation is.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from json import loads
from typing import NamedTuple, Protocol, TypeVar

from gkd.data.turns import Transcript, TurnEncoder
from gkd.environments import Environment, EnvironmentFailedError, EnvironmentKind, Observed, Task
from gkd.errors import ConversationError
from gkd.registry import SOURCES
from gkd.seeding import derive_seed
from gkd.serving.threads import in_thread, map_in_threads
from gkd.types import Completion, Conversation, ConversationEnd, PromptDraw, Rollout, SampleRequest, SamplingSettings

_log = logging.getLogger(__name__)
T = TypeVar("T")
Decode = Callable[[Sequence[int]], str]


class Generates(Protocol):
    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]: ...


@dataclass(frozen=True)
class Held:
    """A conversation that has ended. The completion's `logprobs` are of the student's own tokens."""

    completion: Completion
    conversation: Conversation
    reward: float | None


@dataclass
class _Talk:
    """One that goes on."""

    draw: PromptDraw
    request: SampleRequest
    settings: SamplingSettings  # of all of it: `max_new_tokens` is what turns and observations have together
    environment: Environment
    said: Transcript
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    observed: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    turn: tuple[int, ...] = ()  # the last one
    turns: int = 0
    end: ConversationEnd | None = None
    reward: float | None = None

    @property
    def room(self) -> int:
        return self.settings.max_new_tokens - len(self.token_ids)

    @property
    def name(self) -> str:
        prompt = self.draw.prompt
        return f"{prompt.origin}: sample {self.draw.sample_index}, turn {self.turns}"

    def next_turn(self, most_tokens: int | None) -> SampleRequest:
        limit = self.room if most_tokens is None else min(self.room, most_tokens)
        seed = derive_seed(self.request.seed, "turn", self.turns)
        return SampleRequest((*self.request.prompt_ids, *self.token_ids), seed, limit)

    def take(self, completion: Completion) -> None:
        self.turn = completion.token_ids
        self.token_ids += completion.token_ids
        self.logprobs += completion.logprobs
        self.turns += 1
        if completion.finish_reason == "length" and not self.room:
            self.end = "tokens"

    def earn(self, reward: float | None) -> None:
        if reward is not None:
            self.reward = (self.reward or 0.0) + reward

    def read(self, ids: tuple[int, ...]) -> None:
        """Unless no turn could follow."""
        if len(ids) >= self.room:
            self.end = "tokens"
            return
        self.observed.append((len(self.token_ids), len(self.token_ids) + len(ids)))
        self.token_ids += ids

    def held(self) -> Held:
        assert self.end is not None
        completion = Completion(
            tuple(self.token_ids), tuple(self.logprobs), "length" if self.end == "tokens" else "stop"
        )
        return Held(completion, Conversation(tuple(self.observed), self.turns, self.end), self.reward)


class Conversations:
    """Holds them, with any sampler."""

    def __init__(self, kind: EnvironmentKind, turns: TurnEncoder, readable: Decode) -> None:
        """`readable` leaves out special tokens: what an environment is given of a turn."""
        self._kind, self._turns, self._readable = kind, turns, readable

    def hold(
        self,
        draws: Sequence[PromptDraw],
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        sampler: Generates,
        step: int,
    ) -> list[Held]:
        """One of each draw, whose request has its prompt and its seed. `step` decides how many turns there may be.

        Raises ConversationError if an environment fails or answers something else than an observation, or if the chat
        template has no place for one.
        """
        talks = [
            _Talk(draw, request, settings, self._open(), Transcript(draw.prompt))
            for draw, request in zip(draws, requests, strict=True)
        ]
        try:
            self._of_each(talks, self._reset)
            while going := [talk for talk in talks if talk.end is None]:
                turns = [talk.next_turn(self._kind.turn_tokens) for talk in going]
                for talk, completion in zip(going, sampler.generate(turns, settings), strict=True):
                    talk.take(completion)
                self._observe([talk for talk in going if talk.end is None], self._kind.turns_at(step))
            self._of_each([talk for talk in talks if talk.end != "done"], self._leave)
        finally:
            self._of_each(talks, self._close)
        return [talk.held() for talk in talks]

    def _observe(self, talks: Sequence[_Talk], most_turns: int) -> None:
        for talk, observed in zip(talks, self._of_each(talks, self._step), strict=True):
            if observed is None:
                talk.end = "timeout"
                continue
            talk.earn(observed.reward)
            if observed.done or talk.turns >= most_turns:
                talk.end = "done" if observed.done else "turns"
                continue
            ids = self._turns.observation_ids(talk.said, talk.turn, observed.observation)
            if ids is None:
                talk.end = "stopped"
            else:
                talk.read(ids)

    def _of_each(self, talks: Sequence[_Talk], ask: Callable[[_Talk], T]) -> list[T]:
        return map_in_threads(ask, talks, self._kind.concurrency)

    def _reset(self, talk: _Talk) -> None:
        """One that takes too long has no first turn to be cut off after: that is an error."""
        prompt = talk.draw.prompt
        data = None if prompt.task is None else loads(prompt.task)
        task = Task(prompt.text, data, derive_seed(talk.request.seed, "environment"))
        if self._within_time(talk, partial(talk.environment.reset, task)) is _LATE:
            raise ConversationError(
                f"environment: {self._kind.kind}: {talk.name}: not ready after {self._kind.timeout_s:g} s; is "
                "environment.timeout_s too short?",
                is_temporary=True,
            )

    def _leave(self, talk: _Talk) -> None:
        """Of one that ended before its environment was done."""
        reward = self._within_time(talk, talk.environment.unfinished)
        if reward is not _LATE:
            self._refuse(talk, _fault_of(Observed("", reward=reward)))  # pyright: ignore[reportArgumentType]
            talk.earn(reward)  # pyright: ignore[reportArgumentType]

    def _close(self, talk: _Talk) -> None:
        """Nothing depends on it any more: what goes wrong is said."""
        try:
            self._within_time(talk, talk.environment.close)
        except ConversationError as error:
            _log.warning("%s: while it was closed", error)

    def _open(self) -> Environment:
        try:
            return self._kind.open()
        except Exception as error:
            raise ConversationError(f"environment: {self._kind.kind}: {type(error).__name__}: {error}") from error

    def _step(self, talk: _Talk) -> Observed | None:
        """None: it took too long."""
        observed = self._within_time(talk, partial(talk.environment.step, self._readable(talk.turn)))
        if observed is _LATE:
            return None
        self._refuse(talk, _fault_of(observed))
        assert isinstance(observed, Observed)
        return observed

    def _refuse(self, talk: _Talk, fault: str | None) -> None:
        if fault is not None:
            raise ConversationError(f"environment: {self._kind.kind}: {talk.name}: {fault}")

    def _within_time(self, talk: _Talk, call: Callable[[], object]) -> object:
        """What it returns, or `_LATE`. Its thread goes on; nobody waits for it."""
        try:
            return in_thread(call).result(self._kind.timeout_s)
        except concurrent.futures.TimeoutError:
            return _LATE
        except Exception as error:
            is_said = isinstance(error, EnvironmentFailedError)
            what = str(error) if is_said else f"{type(error).__name__}: {error}"
            raise ConversationError(
                f"environment: {self._kind.kind}: {talk.name}: {what}", is_temporary=is_said and error.is_temporary
            ) from error


_LATE = object()


class ConversationCounts(NamedTuple):
    """Of the conversations that the student held in a step: sums, over one rank or all."""

    conversations: float
    turns: float
    observed: float  # tokens
    done: float
    late: float
    judged: float
    reward: float


def conversation_counts(rollouts: Sequence[Rollout]) -> ConversationCounts:
    own = [rollout for rollout in rollouts if SOURCES.drawn(rollout.source).in_step]
    held = [(rollout, rollout.conversation) for rollout in own if rollout.conversation is not None]
    rewards = [rollout.reward for rollout, _ in held if rollout.reward is not None]
    return ConversationCounts(
        len(held),
        sum(one.turns for _, one in held),
        sum(len(rollout.completion_ids) - len(rollout.scored_places) for rollout, _ in held),
        sum(one.end == "done" for _, one in held),
        sum(one.end == "timeout" for _, one in held),
        len(rewards),
        sum(rewards),
    )


def conversation_metrics(counts: ConversationCounts) -> dict[str, float]:
    """None where there were no conversations."""
    count = counts.conversations
    if not count:
        return {}
    return {
        "environment/turns": counts.turns / count,
        "environment/observed_tokens": counts.observed / count,
        "environment/done_share": counts.done / count,
        "environment/timeout_share": counts.late / count,
        **({"reward/mean": counts.reward / counts.judged} if counts.judged else {}),
    }


def _fault_of(observed: object) -> str | None:
    if not isinstance(observed, Observed):
        return f"a {type(observed).__name__} and no Observed came of a turn"
    if not isinstance(observed.observation, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's class
        return f"an observation is text, not {type(observed.observation).__name__}"
    if any("\ud800" <= character <= "\udfff" for character in observed.observation):
        return "an observation holds half a surrogate pair"
    if observed.reward is None:
        return None
    if not isinstance(observed.reward, (int, float)) or not abs(observed.reward) < math.inf:  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"a reward is a finite number, not {observed.reward}"
    return None
