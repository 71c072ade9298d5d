"""What a run measures of its student at a moment: held-out divergences, and greedy answers to be looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gkd.errors import RunFolderError
from gkd.files import read_json_object, write_atomically
from gkd.measures.answers import AnswerScoring, answer_rollouts, sample_requests
from gkd.measures.heldout import HeldoutEvaluation
from gkd.monitor import JsonlSink
from gkd.rollout.conversations import Conversations
from gkd.rollout.sync import SyncedSampler
from gkd.train.distributed import together
from gkd.types import ConversationEnd, Prompt, PromptDraw, Rollout, SamplingSettings

_ENDS: dict[ConversationEnd, str] = {
    "done": "the environment was done",
    "stopped": "the student ended the text",
    "turns": "no turn was left",
    "tokens": "no token was left",
    "timeout": "the environment took too long",
}


class Snapshot(NamedTuple):
    """The contents of a before.json."""

    heldout: dict[str, float]  # by metric
    answers: list[str]  # to the prompts that are shown; none on a rank that is not main


def read_snapshot(path: Path) -> Snapshot:
    """Raises RunFolderError, which says how to go on without, if it is missing or damaged."""
    nothing = Snapshot({}, [])
    advice = (
        f"bring it back, or write {json.dumps(nothing._asdict())} into it to go on without the figures before training"
    )
    try:
        values = read_json_object(path, RunFolderError)
    except RunFolderError as error:
        raise RunFolderError(f"{error}; {advice}") from None
    if values.keys() != nothing._asdict().keys():
        raise RunFolderError(f"{path}: has other keys than {', '.join(nothing._fields)}; {advice}")
    return Snapshot(**values)


class Snapshots:
    """Every method but `close` is collective.

    `heldout` None: there is no such data. `positions`: where the main rank keeps the divergences by position.
    `shown`: the prompts that the student is asked, with greedy `settings`. `decode` leaves out special tokens.
    """

    def __init__(
        self,
        *,
        heldout: HeldoutEvaluation | None,
        positions: JsonlSink | None,
        sampler: SyncedSampler,
        scoring: AnswerScoring,
        shown: Sequence[Prompt],
        settings: SamplingSettings,
        seed: int,
        decode: Callable[[Sequence[int]], str],
        is_main: bool,
        conversations: Conversations | None = None,
    ) -> None:
        self._heldout, self._positions = heldout, positions
        self._sampler, self._scoring, self._settings = sampler, scoring, settings
        self._shown, self._seed = shown, seed
        self._decode, self._is_main = decode, is_main
        self._conversations = conversations

    def take(self, steps_done: int, tokens_path: Path) -> Snapshot:
        """The answers also go into `tokens_path`, token by token."""
        heldout = self.heldout(steps_done)
        answers = self._answers(steps_done)
        if self._shown:
            scored = self._scoring.measure(answer_rollouts(self._shown, answers))
            if self._is_main:
                write_atomically(tokens_path, scored.model_dump_json().encode())
        return Snapshot(heldout, [shown_answer(answer, self._decode) for answer in answers])

    def heldout(self, steps_done: int) -> dict[str, float]:
        """The means; what they are made of by position goes into the run folder."""
        if self._heldout is None:
            return {}
        figures = self._heldout.measure()
        if self._positions is not None and any(figures.tokens):
            self._positions.log(steps_done, figures.as_record())
        return figures.means

    def close(self) -> None:
        if self._positions is not None:
            self._positions.close()

    def _answers(self, steps_done: int) -> list[Rollout]:
        """The main rank's; the others ask for none, but an engine may span several ranks."""
        shown = self._shown if self._is_main else ()
        requests, draws = sample_requests(shown, self._seed), [PromptDraw(prompt, 0) for prompt in shown]
        conversations = self._conversations
        if conversations is None:
            completions = together(lambda: self._sampler.generate(requests, self._settings))
            return [Rollout(draw, "student", one.token_ids) for draw, one in zip(draws, completions, strict=True)]
        held = together(lambda: conversations.hold(draws, requests, self._settings, self._sampler, steps_done))
        return [
            Rollout(draw, "student", one.completion.token_ids, conversation=one.conversation, reward=one.reward)
            for draw, one in zip(draws, held, strict=True)
        ]


def shown_answer(answer: Rollout, decode: Callable[[Sequence[int]], str]) -> str:
    """Of a conversation one paragraph a turn, and what was observed indented behind `>`."""
    if answer.conversation is None:
        return decode(answer.completion_ids)
    parts: list[str] = []
    for turn, (start, end) in zip(answer.turns, (*answer.conversation.observed, (0, 0)), strict=True):
        parts.append(decode([answer.completion_ids[place] for place in turn]))
        observed = decode(answer.completion_ids[start:end])
        parts += ["\n".join(f"> {line}" for line in observed.splitlines())] if observed else []
    reward = "" if answer.reward is None else f", reward {answer.reward:g}"
    return "\n\n".join([*parts, f"({answer.conversation.turns} turns, {_ENDS[answer.conversation.end]}{reward})"])
