"""What a model is asked, what it says, and what both are known by."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from gkd.data.formats import Message

PromptKind = Literal["messages", "text"]  # a conversation, or raw text
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class AskSettings:
    """How answers are drawn. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    logprobs: bool

    def words(self) -> list[object]:
        """For a digest."""
        return [self.max_new_tokens, self.temperature, self.top_p, list(self.stop), self.logprobs]


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation, or raw text to go on with; `number` is which of its answers."""

    prompt: tuple[Message, ...] | str
    settings: AskSettings
    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    mean_logprob: float | None = None  # natural, of its tokens


@dataclass(frozen=True, slots=True)
class Failure:
    """No answer to this one question: the reason that is counted, and what was said of it."""

    reason: str
    detail: str = ""


Outcome: TypeAlias = Answer | Failure
Arrived = Callable[[Sequence[tuple[int, Outcome]]], None]  # (place of the question, what came of it)


class Author(Protocol):
    """A model that answers questions."""

    identity: str  # everything that decides an answer besides its question
    is_here: bool  # in this process: it answers one call after the other

    async def answer(self, questions: Sequence[tuple[Question, int]], arrived: Arrived) -> None:
        """Of (question, seed) each; hands over every outcome once, as it comes, one or several at a time.

        Raises what means that no further question can be answered either.
        """
        ...

    def refusal(self, kind: PromptKind) -> str | None:
        """Why it cannot be asked so; None: it can."""
        ...

    async def close(self) -> None: ...


def question_digest(question: Question) -> bytes:
    """Of everything in the question; its author is no part of it."""
    words = [question.prompt, question.settings.words(), question.number]
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=_DIGEST_BYTES).digest()


def answer_key(question: bytes, identity: str, seed: int) -> bytes:
    """What the answer to a question, given as its digest, is kept under: its author and the recipe's seed count too."""
    return hashlib.blake2b(question, digest_size=_DIGEST_BYTES, key=_short(identity, seed)).digest()


@functools.lru_cache(maxsize=64)
def _short(identity: str, seed: int) -> bytes:
    return hashlib.blake2b(json.dumps([identity, seed]).encode(), digest_size=_DIGEST_BYTES).digest()
