"""A student's answers token by token: how far the models are apart at each, and what the teacher would say there.

Plain data without torch: a run writes it, its report reads it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Alternative(_Record):
    """A token that the teacher finds likely."""

    id: int
    text: str
    probability: float


class AnswerToken(_Record):
    """A token of an answer. Divergences are in nats, whole vocabulary, temperature 1.

    None stands for what is not finite, and for the probability of a token that is not in the shared vocabulary. Of a
    teacher that gives its top k only, it also stands for the divergences and for the probability of any other token; of
    what an environment said in between, for everything.
    """

    id: int
    text: str
    forward_kl: float | None
    reverse_kl: float | None
    jsd: float | None
    student_probability: float | None
    teacher_probability: float | None
    alternatives: tuple[Alternative, ...]  # the teacher's most likely tokens, the most likely first


class Answer(_Record):
    """What the student answered to one held-out prompt."""

    prompt: str
    tokens: tuple[AnswerToken, ...]


class AnswerTokens(_Record):
    """The contents of a samples/tokens_before.json or samples/tokens_after.json."""

    format: Literal[1] = 1
    answers: tuple[Answer, ...]
