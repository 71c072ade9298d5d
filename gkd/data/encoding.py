"""Rows become token ids: of the whole text, for the ids of pieces are not those of the whole.

A tokenizer may put tokens around a text, a space before it, or one token over the border of two pieces. So prompt and
completion are tokenised as one text, and the completion is what follows the prompt's own ids, which a sampler sees.

What people type stays text. A conversation that contains a control token's name ("<|im_start|>") is rendered
with marks in place of those strings, so that the template's own control tokens can be told from typed ones.
Raw text is tokenised as it stands, control tokens included, because such rows often carry a template already.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gkd.begin_tokens import begin_ids
from gkd.data.formats import Message, Row
from gkd.data.templates import MARK, MARK_END, ChatTemplate
from gkd.errors import DataError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "\uf8fe"  # private use: begins the names that stand for control tokens
_ANCHORS = ("", "\n", ".", "a")  # what a continuation is tokenised behind, until one leaves its text as it was
_SHOWN_CHARACTERS = 24  # on each side of a border


@dataclass(frozen=True, slots=True)
class Marked:
    """A conversation whose typed control strings are replaced by marks; `literals` says by which."""

    messages: tuple[Message, ...]
    literals: dict[str, str]  # mark -> what was typed


class RowEncoder:
    """Token ids of a row's prompt and completion.

    `left_out` and `split_tokens` collect what was seen on the way: the rows of which the template leaves something out
    (role or "think" -> origins), and those whose prompt and completion would share a token if they were one text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.left_out: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self.split_tokens: list[str] = []
        added = tokenizer.added_tokens_decoder.items()
        self._control = {str(token.content): (index, token) for index, token in added if token.special}
        longest_first = sorted(self._control, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or r"(?!)"  # no control token: never matches
        self.control_pattern = re.compile(names)
        # The first of the control tokens that close a text, whatever whitespace stands among them.
        self._end_of_turn = re.compile(rf"({names})(?:\s|{names})*\Z")

    def prompt_ids(self, row: Row) -> list[int]:
        """Raises DataError for a conversation that the tokenizer cannot render."""
        if row.messages is None:
            return self._raw_ids(row.prompt_text or "")
        marked = self.mark(row.messages)
        return self.encode(self._render(marked.messages, row.origin, ask=True), marked.literals, row.origin)

    def completion_ids(self, row: Row, prompt_ids: list[int]) -> tuple[int, ...] | None:
        """The data set's own answer up to its end token; None if the row has none.

        Raises DataError, with both readings, for an answer that cannot be tokenised behind the prompt's ids.
        """
        if row.messages is None:
            return None if row.completion_text is None else self._raw_completion_ids(row, prompt_ids)
        return None if row.completion_messages is None else self._chat_completion_ids(row, prompt_ids)

    # ---- raw text

    def _raw_ids(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        has_bos = isinstance(bos, str) and text.startswith(bos)  # a template was applied: no second one
        return self.bare_ids(text) if has_bos else [*self._begin_ids, *self.bare_ids(text)]

    @cached_property
    def _begin_ids(self) -> list[int]:
        return begin_ids(self._tokenizer)

    def bare_ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _raw_completion_ids(self, row: Row, prompt_ids: list[int]) -> tuple[int, ...]:
        prompt, answer = row.prompt_text or "", row.completion_text or ""
        ids = self._continuation(prompt_ids, self._raw_ids(prompt + answer), answer, self.bare_ids, row.origin)
        end = self._end_token_id(row)
        return (*ids,) if ids and ids[-1] == end else (*ids, end)

    def _end_token_id(self, row: Row) -> int:
        end = self._tokenizer.eos_token_id
        if not isinstance(end, int):
            raise DataError(f"{row.origin}: a completion needs an end, but the tokenizer has no eos token")
        return end

    # ---- conversations

    def _chat_completion_ids(self, row: Row, prompt_ids: list[int]) -> tuple[int, ...]:
        assert row.messages is not None
        assert row.completion_messages is not None
        marked = self.mark(row.messages + row.completion_messages)
        prompt = self._template.render(marked.messages[:-1], row.origin, ask=True)
        full = self._render(marked.messages, row.origin, ask=False)
        if not full.startswith(prompt):
            raise DataError(
                f"{row.origin}: the chat template is not prefix-stable: with the answer, the text of the "
                "prompt changes, and the answer cannot be cut out; give 'prompt' and 'completion' as raw text"
            )
        answer, ends = self._cut_after_end_of_turn(full[len(prompt) :])

        def encode(text: str) -> list[int]:
            return self.encode(text, marked.literals, row.origin)

        ids = self._continuation(prompt_ids, encode(prompt + answer), answer, encode, row.origin)
        return tuple(ids) if ends else (*ids, self._end_token_id(row))

    def _cut_after_end_of_turn(self, answer: str) -> tuple[str, bool]:
        """Without what a template adds after its end token, such as a newline; False if there is none."""
        match = self._end_of_turn.search(answer)
        return (answer[: match.end(1)], True) if match else (answer.rstrip(), False)

    def _render(self, messages: Sequence[Message], origin: str, *, ask: bool) -> str:
        text = self._template.render(messages, origin, ask=ask)
        for what in self._template.left_out(messages, text, ask=ask):
            self.left_out[what][origin] = None
        return text

    # ---- the whole and its pieces

    def _continuation(
        self, prompt_ids: list[int], whole: list[int], answer: str, encode: Callable[[str], list[int]], origin: str
    ) -> list[int]:
        """The ids of `answer` behind `prompt_ids`: those of the whole text, or others that spell the same."""
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # One token would reach over the border. A sampler continues the prompt's tokens, and so must the answer.
        text = self.decode(whole)
        for anchor in _ANCHORS:
            before, both = encode(anchor), encode(anchor + answer)
            ids = both[len(before) :]
            if both[: len(before)] == before and self.decode(prompt_ids + ids) == text:
                self.split_tokens.append(origin)
                return ids
        border = len(self.decode(prompt_ids))
        around = slice(max(0, border - _SHOWN_CHARACTERS), border + _SHOWN_CHARACTERS)
        pieces = self.decode(prompt_ids + encode(answer))
        raise DataError(
            f"{origin}: prompt and completion tokenised apart read {shown(pieces[around])}, and as one text "
            f"{shown(text[around])}; let the prompt end, or the completion begin, elsewhere in the text"
        )

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # cleaning would hide a space
        assert isinstance(text, str)
        return text

    # ---- typed control tokens

    def mark(self, messages: Sequence[Message]) -> Marked:
        contents = [message["content"] for message in messages]
        if not any(self.control_pattern.search(content) for content in contents):
            return Marked(tuple(messages), {})
        mark = MARK
        while any(mark in content for content in contents):  # doubled until the conversation does not hold it
            mark += MARK
        literals: dict[str, str] = {}

        def replace(match: re.Match[str]) -> str:
            name = f"{mark}{len(literals)}{MARK_END}"
            literals[name] = match.group()
            return name

        marked = [{**m, "content": self.control_pattern.sub(replace, m["content"])} for m in messages]
        return Marked(tuple(marked), literals)

    def encode(self, text: str, literals: dict[str, str], origin: str) -> list[int]:
        """Token ids of rendered text; marks become the text that was typed, beside what stands around it."""
        if not literals:
            return self.bare_ids(text)
        backend, names, control_ids = self._stand_ins
        if backend is None or _STAND_IN in text:
            what = "this tokenizer" if backend is None else f"a text with the character U+{ord(_STAND_IN):X}"
            raise DataError(f"{origin}: {what} cannot take a control token's name as text")
        pattern = re.compile("|".join([*map(re.escape, literals), self.control_pattern.pattern]))
        replaced = pattern.sub(lambda match: literals.get(match.group()) or names[match.group()], text)
        ids = backend.encode(replaced, add_special_tokens=False).ids
        if not {index for index, _ in self._control.values()}.isdisjoint(ids):
            raise DataError(f"{origin}: this tokenizer cannot take a control token's name as text")
        return [control_ids.get(index, index) for index in ids]

    @cached_property
    def _stand_ins(self) -> tuple[Tokenizer | None, dict[str, str], dict[int, int]]:
        """A copy of the tokenizer that reads control tokens' names as text, with tokens of other names for those that
        the template wrote; these names; and which id of the copy is which control token."""
        original = getattr(self._tokenizer, "backend_tokenizer", None)
        if original is None:
            return None, {}, {}
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(original.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        names = {name: f"{_STAND_IN}{place}{MARK_END}" for place, name in enumerate(self._control)}
        control_ids: dict[int, int] = {}
        for name, (index, token) in self._control.items():
            flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            backend.add_tokens([AddedToken(names[name], special=False, **flags)])
            added = backend.token_to_id(names[name])
            assert added is not None
            control_ids[added] = index
        return backend, names, control_ids
