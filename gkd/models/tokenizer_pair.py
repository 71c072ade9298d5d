"""Do student and teacher speak of the same tokens? Asked once, before anything is trained."""

from __future__ import annotations

import logging
from typing import Protocol

from gkd.errors import TokenizerMismatchError

logger = logging.getLogger(__name__)

_SHOWN = 3
_KEY = "student.model"


class HasVocabulary(Protocol):
    """What is asked of a tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


def check_tokenizer_pair(
    student_tokenizer: HasVocabulary, teacher_tokenizer: HasVocabulary, student_vocab_rows: int, teacher_vocab_rows: int
) -> int:
    """Returns how many vocabulary columns, counted from 0, the divergence runs over.

    Both tokenizers must map the same tokens, added ones included, to the same ids. The rows of an output head may be
    padded beyond them (151665 tokens in 151936 or 152064 rows), differently on both sides: the result is
    min(student_vocab_rows, teacher_vocab_rows), and columns beyond it belong to one side only and are masked there,
    which is logged. Padding that both sides have stays: both models give it probability, and so it is compared.

    Raises TokenizerMismatchError if a token's id differs (naming the first three), or if an id has no row on one side.
    """
    student_vocab, teacher_vocab = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student_vocab != teacher_vocab:
        raise TokenizerMismatchError(_mismatch(student_vocab, teacher_vocab))
    valid_vocab = min(student_vocab_rows, teacher_vocab_rows)
    beyond = sorted((index, token) for token, index in student_vocab.items() if index >= valid_vocab)
    if beyond:
        side = "student" if student_vocab_rows <= teacher_vocab_rows else "teacher"
        shown = ", ".join(f"{index} {token!r}" for index, token in beyond[:_SHOWN])
        raise TokenizerMismatchError(
            f"{side}.model: its output head has {valid_vocab} rows, too few for the tokens {shown}"
            f"{_more(beyond)}: the model does not belong to its tokenizer"
        )
    if student_vocab_rows != teacher_vocab_rows:
        logger.info(
            "vocabulary: the student's head has %d rows, the teacher's %d, for the same tokens; the divergence runs "
            "over the %d that both have, the others are masked",
            student_vocab_rows, teacher_vocab_rows, valid_vocab,
        )  # fmt: skip
    return valid_vocab


def _mismatch(student_vocab: dict[str, int], teacher_vocab: dict[str, int]) -> str:
    student_tokens, teacher_tokens = _by_id(student_vocab), _by_id(teacher_vocab)
    differing = [
        index for index in sorted(student_tokens.keys() | teacher_tokens.keys())
        if student_tokens.get(index) != teacher_tokens.get(index)
    ]  # fmt: skip
    shown = "; ".join(
        f"id {index} is {_shown(student_tokens.get(index))} for the student and "
        f"{_shown(teacher_tokens.get(index))} for the teacher"
        for index in differing[:_SHOWN]
    )
    return (
        f"{_KEY}: its tokenizer differs from that of teacher.model: {shown}{_more(differing)}. Set "
        "teacher.alignment: shared to compare their texts by bytes, take a student of the teacher's family, or make "
        "one with student.init.layers"
    )


def _by_id(vocab: dict[str, int]) -> dict[int, tuple[str, ...]]:
    """id -> its tokens: damaged tokenizers give one id to several."""
    tokens: dict[int, tuple[str, ...]] = {}
    for token in sorted(vocab):
        tokens[vocab[token]] = (*tokens.get(vocab[token], ()), token)
    return tokens


def _shown(tokens: tuple[str, ...] | None) -> str:
    return "no token" if tokens is None else " and ".join(map(repr, tokens))


def _more(items: list) -> str:
    return f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
