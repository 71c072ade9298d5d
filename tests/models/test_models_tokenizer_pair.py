"""Same tokens, same ids; padding of the heads masked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gkd.errors import TokenizerMismatchError
from gkd.models import check_tokenizer_pair, load_tokenizer


class Tokenizer:
    def __init__(self, *tokens: str) -> None:
        self._vocab = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


LETTERS = Tokenizer(*"abcdefgh")


def test_the_same_tokenizer(tiny_student: Path, tiny_teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = load_tokenizer(str(tiny_student)), load_tokenizer(str(tiny_teacher))
    with caplog.at_level(logging.INFO, "gkd"):
        assert check_tokenizer_pair(student, teacher, 259, 259) == 259
    assert not caplog.records


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(10, 16), (16, 10), (8, 16), (8, 8), (12, 12)])
def test_padding_of_one_side_is_masked(student_rows: int, teacher_rows: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gkd"):
        valid = check_tokenizer_pair(LETTERS, Tokenizer(*"abcdefgh"), student_rows, teacher_rows)
    assert valid == min(student_rows, teacher_rows)
    assert len(caplog.records) == (student_rows != teacher_rows)


def test_ids_permuted() -> None:
    with pytest.raises(TokenizerMismatchError) as caught:
        check_tokenizer_pair(LETTERS, Tokenizer(*"abdcefgh"), 8, 8)
    assert str(caught.value).startswith(
        "student.model: its tokenizer differs from that of teacher.model: id 2 is 'c' for the student and 'd' for "
        "the teacher; id 3 is 'd' for the student and 'c' for the teacher. "
    )


def test_another_tokenizer_names_three() -> None:
    with pytest.raises(TokenizerMismatchError, match=r"id 0 is 'a' .*; id 1 .*; id 2 .* and 5 more\. .*init\.layers"):
        check_tokenizer_pair(LETTERS, Tokenizer(*"hgfedcba"), 8, 8)


def test_an_added_token_on_one_side() -> None:
    with pytest.raises(TokenizerMismatchError, match="id 8 is no token for the student and '<think>' for the teacher"):
        check_tokenizer_pair(LETTERS, Tokenizer(*"abcdefgh", "<think>"), 16, 16)


def test_tokens_without_a_row() -> None:
    with pytest.raises(TokenizerMismatchError, match=r"^teacher\.model: its output head has 6 rows, .* 6 'g', 7 'h':"):
        check_tokenizer_pair(LETTERS, LETTERS, 8, 6)
