"""What follows a student's turn in a conversation: the observation, and the opening of the next turn, as token ids.

Nothing that was sampled is encoded again. The chat template renders the conversation with a mark in the place of the
turn, and what stands behind the mark is encoded alone: the turn's end, where the student did not write it, the
observation's message, and the opening of the assistant's. The same rendering with the turn itself must begin with what
the student has read and written so far, whitespace aside; else the template would have shown another history than the
one that was sampled from (one that drops thoughts, say), and the conversation is refused, with the place.

A row of raw text has no template: the observation's tokens follow as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gkd.data.encoding import RowEncoder
from gkd.data.formats import Message
from gkd.data.templates import MARK, MARK_END, ChatTemplate, is_shown
from gkd.environments import EnvironmentKind
from gkd.errors import ConfigError, ConversationError, DataError, shown
from gkd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN = f"{MARK}turn{MARK_END}"
_SHOWN_CHARACTERS = 24  # on each side of the place where a template says something else


@dataclass
class Transcript:
    """What was said behind a prompt, as messages, and as the text of the tokens."""

    prompt: Prompt
    messages: list[Message] = field(default_factory=list[Message])
    text: str = ""


class TurnEncoder:
    """Of a run's student: one tokenizer, one template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        environment: EnvironmentKind,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._template, self._encoder = template, RowEncoder(tokenizer, template)
        self._stop_token_ids, self._role = frozenset(stop_token_ids), environment.role
        self._most_tokens, self._checks_prefix = environment.max_observation_tokens, environment.check_prefix

    def text_of(self, turn: Sequence[int]) -> str:
        """A turn as a message has it: without the stop token that ends it."""
        is_ended = bool(turn) and turn[-1] in self._stop_token_ids
        return self._encoder.decode([*turn[: len(turn) - is_ended]])

    def probe(self, prompt: Prompt) -> str:
        """What follows a turn, for people to read. Raises ConfigError where nothing can."""
        try:
            ids = self.observation_ids(Transcript(prompt), self._encoder.bare_ids("Yes."), "(an observation)")
        except ConversationError as error:
            raise ConfigError(str(error)) from None
        return self._encoder.decode([*(ids or ())])

    def observation_ids(self, said: Transcript, turn: Sequence[int], observation: str) -> tuple[int, ...] | None:
        """What follows `turn`; `said` then holds both. None: the turn ended the text, and nothing can follow.

        Raises ConversationError where the template shows another history than `said`, or refuses it.
        """
        content = self._cut(observation)
        if said.prompt.messages is None:
            ids = self._encoder.bare_ids(content)
            said.text += self._encoder.decode([*turn, *ids])
            return tuple(ids)
        try:
            end, ids = self._behind_turn(said, content)
            if end is not None and turn[-1] in self._stop_token_ids and turn[-1] != end:
                return None
            is_ended = bool(turn) and (turn[-1] == end or (end is None and turn[-1] in self._stop_token_ids))
            ids = ids if is_ended or end is None else (end, *ids)
            self._say(said, turn, content, ids)
        except DataError as error:
            raise ConversationError(f"environment: {error}") from None
        return ids

    def _cut(self, observation: str) -> str:
        ids = self._encoder.bare_ids(observation)
        return observation if len(ids) <= self._most_tokens else self._encoder.decode(ids[: self._most_tokens])

    def _behind_turn(self, said: Transcript, observation: str) -> tuple[int | None, tuple[int, ...]]:
        """The token that ends a turn, if the template has one, and what follows it."""
        prompt = said.prompt
        marked = self._encoder.mark([{"role": self._role, "content": observation}])
        turn: Message = {"role": "assistant", "content": _TURN}
        text = self._render(prompt, [*said.messages, turn, *marked.messages], ask=True)
        if text.count(_TURN) != 1:
            raise DataError(f"{prompt.origin}: the chat template does not show the assistant's turn once, as it is")
        behind = text[text.index(_TURN) + len(_TURN) :]
        if not is_shown(marked.messages[0]["content"], behind):
            raise DataError(
                f"{prompt.origin}: the chat template does not show a message of role {self._role} behind the "
                "assistant's; set environment.role to the other of user and tool, or take another template"
            )
        found = re.match(rf"\s*({self._encoder.control_pattern.pattern})", behind)
        if found is None:
            return None, tuple(self._encoder.encode(behind, marked.literals, prompt.origin))
        end, *ids = self._encoder.encode(behind[found.start(1) :], marked.literals, prompt.origin)
        return end, tuple(ids)

    def _say(self, said: Transcript, turn: Sequence[int], observation: str, ids: Sequence[int]) -> None:
        """Raises DataError where the template shows another history."""
        said.text += self._encoder.decode([*turn]) + self._encoder.decode([*ids])
        said.messages.append({"role": "assistant", "content": self.text_of(turn)})
        said.messages.append({"role": self._role, "content": observation})
        if not self._checks_prefix:
            return
        shows = "".join(self._render(said.prompt, said.messages, ask=True).split())
        was = "".join((self._render(said.prompt, [], ask=True) + said.text).split())
        if shows == was:
            return
        place = next(
            (i for i, (a, b) in enumerate(zip(shows, was, strict=False)) if a != b), min(map(len, (shows, was)))
        )
        around = slice(max(0, place - _SHOWN_CHARACTERS), place + _SHOWN_CHARACTERS)
        raise DataError(
            f"{said.prompt.origin}: after turn {len(said.messages) // 2} the chat template writes another history than "
            f"was sampled, from character {place} on (whitespace aside): {shown(shows[around])} in the place of "
            f"{shown(was[around])}; take another template, or set environment.check_prefix to false"
        )

    def _render(self, prompt: Prompt, messages: Sequence[Message], *, ask: bool) -> str:
        begin: list[Message] = [{"role": role, "content": content} for role, content in prompt.messages or ()]
        return self._template.render([*begin, *messages], prompt.origin, ask=ask)
