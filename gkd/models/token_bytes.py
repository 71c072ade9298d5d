"""The bytes that a tokenizer's tokens spell, and the tokens that spell given bytes.

Two tokenizers have nothing in common but this. Byte-level tokenizers (GPT-2's and those after it) write every byte as a
character of their own; SentencePiece ones write a space as U+2581, and bytes that have no token as `<0x0A>`. Of others
the bytes cannot be recovered: WordPiece drops white space and accents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_SPACE = "\u2581"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Without control characters and planes that nobody writes in: tokenizers that were trained may have none of these.
_OF_TEXTS = frozenset([*b"\t\n", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)])
_ANCHORS = ("", "\n", ".", "a")  # what a text is tokenised behind, until one leaves its bytes as they were
_WORD = re.compile(r"\s*\S+|\s+")
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's surrogateescape writes such bytes


class TokenBytes:
    """Of one tokenizer. `key` begins errors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        """Raises ModelError for a tokenizer whose tokens do not say which bytes they are."""
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        described = {} if backend is None else json.loads(backend.to_str())
        family = _family(described)
        if family is None or backend is None:
            kind = type(tokenizer).__name__ if backend is None else described["model"]["type"]
            raise ModelError(
                f"{key}: the bytes of its tokens cannot be recovered ({kind}): byte-level tokenizers and SentencePiece "
                "with byte tokens can be aligned with others; take a model with one of these"
            )
        self.tokenizer, self.key, self._backend = tokenizer, key, _text_only(backend)
        spell = _byte_level if family == "byte_level" else _sentencepiece
        added = tokenizer.added_tokens_decoder
        self.control = {index: str(token.content) for index, token in added.items() if token.special}
        literal = {index: str(token.content).encode() for index, token in added.items() if not token.special}
        self._spelled: dict[int, bytes] = {
            index: literal[index] if index in literal else spell(token)
            for token, index in tokenizer.get_vocab().items()
            if index not in self.control
        }
        missing = sorted(_OF_TEXTS & self.unreadable)
        if missing:
            raise ModelError(
                f"{key}: its tokenizer has no token of the byte 0x{missing[0]:02X}, and so cannot read every text; "
                "take a byte-level tokenizer, or SentencePiece with byte_fallback"
            )

    def of(self, token_id: int) -> bytes | None:
        """None of a control token, and of an id that is no token."""
        return self._spelled.get(token_id)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The token of these bytes. Of several it is one that is no mere byte, then the first."""
        found: dict[bytes, int] = {}
        for index in sorted(self._spelled, key=lambda i: (self._is_byte_token(i), i)):
            found.setdefault(self._spelled[index], index)
        found.pop(b"", None)
        return found

    @cached_property
    def unreadable(self) -> frozenset[int]:
        """Bytes that no token is."""
        return frozenset(byte for byte in range(256) if bytes([byte]) not in self.ids)

    def encode(self, data: bytes) -> list[int]:
        """Tokens that spell `data`, which holds nothing `unreadable`: the tokenizer's own of what is text."""
        ids: list[int] = []
        for index, piece in enumerate(_NOT_UTF8.split(data.decode("utf-8", "surrogateescape"))):
            is_text = index % 2 == 0
            ids += self._text_ids(piece) if is_text else self._longest(piece.encode("utf-8", "surrogateescape"))
        return ids

    def spell(self, ids: list[int]) -> bytes:
        """Without control tokens."""
        return b"".join(self._spelled.get(index, b"") for index in ids)

    def _text_ids(self, text: str) -> list[int]:
        """Control tokens' names are text."""
        if not text:
            return []
        data = text.encode()
        for anchor in _ANCHORS:
            before, both = self._encoded(anchor), self._backend.encode(anchor + text, add_special_tokens=False).ids
            if both[: len(before)] == list(before) and self.spell(both[len(before) :]) == data:
                return both[len(before) :]
        words = _WORD.findall(text)  # the tokenizer normalises something: only where it does it is left to the bytes
        return [i for word in words for i in self._text_ids(word)] if len(words) > 1 else self._longest(data)

    @lru_cache(maxsize=64)  # noqa: B019  of the tokenizers of a run, which keeps them to its end
    def _encoded(self, anchor: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(anchor, add_special_tokens=False).ids)

    def _longest(self, data: bytes) -> list[int]:
        return list(self._longest_first(data))

    def _longest_first(self, data: bytes) -> Iterator[int]:
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest_token), start, -1)
            end = next(end for end in ends if data[start:end] in self.ids)
            yield self.ids[data[start:end]]
            start = end

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.ids))

    def _is_byte_token(self, index: int) -> bool:
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(index))) is not None


def _family(described: dict[str, Any]) -> str | None:
    """By the parts of a tokenizer.json."""
    if not described:
        return None
    parts = {part["type"] for name in ("pre_tokenizer", "decoder") for part in _flat(described.get(name))}
    if "ByteLevel" in parts:
        return "byte_level"
    return "sentencepiece" if described["model"].get("byte_fallback") else None


def _flat(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    yield part
    for name in ("pretokenizers", "decoders"):
        for inner in part.get(name, ()):
            yield from _flat(inner)


def _text_only(backend: Tokenizer) -> Tokenizer:
    """A copy that reads the names of control tokens as text."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _sentencepiece(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace(_SPACE, " ").encode()


def _byte_level(token: str) -> bytes:
    table = _byte_of_character()
    # a character of no byte is in a token that was added without being marked so
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
