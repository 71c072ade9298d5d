"""What a teacher with another tokenizer writes: sampled in its own tokens, and handed on in the student's."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from gkd.engines.sampling import SamplerSpec
from gkd.models import TokenizerPair, pad_token_id
from gkd.types import Completion, SampleRequest, SamplingSettings


class Texts(Protocol):
    def get(self, request: SampleRequest) -> Completion: ...


def as_teacher(pair: TokenizerPair, spec: SamplerSpec) -> SamplerSpec:
    """`spec` is of the teacher's model, with the student's padding."""
    return replace(spec, pad_token_id=pad_token_id(pair.teacher.tokenizer, pair.teacher.key))


def as_teacher_ends(pair: TokenizerPair, settings: SamplingSettings) -> SamplingSettings:
    """The student's settings, for whoever ends a text with tokens of its own and shares no columns."""
    return replace(settings, stop_token_ids=pair.teacher_ends, shared_vocab=0)


def for_student(pair: TokenizerPair, written: Completion, most_tokens: int) -> Completion:
    """In the student's tokens, at most so many: the rest is left out. The teacher's log-probabilities are of others."""
    ids = pair.for_student(written.token_ids)
    is_whole = written.finish_reason == "stop" and len(ids) <= most_tokens
    return Completion(ids[:most_tokens], (), "stop" if is_whole else "length")


class CachedForStudent:
    """Implements `Texts`: each text is encoded once."""

    def __init__(self, texts: Texts, pair: TokenizerPair, most_tokens: int) -> None:
        self._texts, self._pair, self._most_tokens = texts, pair, most_tokens
        self._known: dict[SampleRequest, Completion] = {}

    def get(self, request: SampleRequest) -> Completion:
        if request not in self._known:
            self._known[request] = for_student(self._pair, self._texts.get(request), self._most_tokens)
        return self._known[request]
