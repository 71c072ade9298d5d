"""Texts that student and teacher draw together, in rounds over all texts that have not ended.

In a round the student goes on with each text by a few tokens, which its sampler does from its prefix cache where it has
one; the teacher reads all of it, in one forward; and the source says which of these tokens stand, and whether the
teacher draws the one behind them. What does not stand is thrown away.

Given the text so far every draw is fresh: the student's of a round have the seed (text's seed, "student", place of the
first of them), a teacher's token has (text's seed, "teacher", its place), and no place is the first of two rounds. So a
text is drawn token by token from what the source says of one token, however long the rounds are.

Legend: n tokens of a round's proposal, V vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from gkd.chunks import loss_chunk_bytes
from gkd.models import head_logits
from gkd.rollout.sources.base import Source
from gkd.seeding import derive_seed
from gkd.types import Completion, HiddenScores, PromptDraw, Rollout, SampleRequest, SamplingSettings


@dataclass
class _Text:
    """One that grows. `logprobs` are the student's of the tokens that it drew, NaN of the teacher's."""

    draw: PromptDraw
    request: SampleRequest  # of the whole text
    settings: SamplingSettings
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])

    @property
    def room(self) -> int:
        """Tokens that may follow."""
        return 0 if self.is_stopped else self.settings.max_new_tokens - len(self.token_ids)

    @property
    def is_stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.settings.stop_token_ids

    def ends_with(self, proposal: Completion) -> bool:
        return proposal.finish_reason == "stop" or len(proposal.token_ids) == self.room

    def continued(self, tokens: int) -> SampleRequest:
        """For so many tokens more."""
        seed = derive_seed(self.request.seed, "student", len(self.token_ids))
        return SampleRequest((*self.request.prompt_ids, *self.token_ids), seed, tokens)

    def as_draw(self) -> PromptDraw:
        """All of it as a prompt, in either context."""
        prompt, ids = self.draw.prompt, tuple(self.token_ids)
        view = None if prompt.teacher_ids is None else prompt.teacher_ids + ids
        return replace(self.draw, prompt=replace(prompt, token_ids=prompt.token_ids + ids, teacher_ids=view))

    def take(self, proposal: Completion, count: int) -> None:
        self.token_ids += proposal.token_ids[:count]
        self.logprobs += proposal.logprobs[:count]

    def take_teachers(self, logits: torch.Tensor) -> None:
        """`logits` are those of its next token, [V]."""
        self.token_ids.append(draw_token(logits, derive_seed(self.request.seed, "teacher", len(self.token_ids))))
        self.logprobs.append(math.nan)

    def completion(self) -> Completion:
        return Completion(tuple(self.token_ids), tuple(self.logprobs), "stop" if self.is_stopped else "length")


_Proposal = tuple[_Text, Completion]


class TogetherSource(Source):
    """Subclasses say who draws which token."""

    judges_ends: bool  # whether tokens may be thrown away even if a text would end with them

    @abstractmethod
    def proposal_tokens(self, seed: int, place: int, room: int) -> int:
        """How many tokens, 0 to `room`, the student is to go on by, where the text of that seed has `place` of them."""

    @abstractmethod
    def places(self, proposed: int) -> range:
        """Which of the places 0 to n, of a proposal's n tokens and the one behind, the teacher is asked about."""

    @abstractmethod
    def teachers_place(self, proposal: Sequence[int], logits: torch.Tensor) -> int | None:
        """At which of these places the teacher draws; what is before it stands. None: all stand, and that is all.

        `logits` are what the teacher says at them, [places, V] in float32.
        """

    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """With the version of the student's weights; the log-probability of a token that the teacher drew is NaN."""
        settings = self.context.settings(step)
        texts = [
            _Text(draw, request, settings)
            for draw, request in zip(draws, self.requests(draws, step, self.name), strict=True)
        ]
        while growing := [text for text in texts if text.room]:
            self._go_on(growing, settings)
        return self.sampled(draws, [text.completion() for text in texts])

    def _go_on(self, texts: Sequence[_Text], settings: SamplingSettings) -> None:
        """One round."""
        judged: list[_Proposal] = []
        for text, proposal in zip(texts, self._proposals(texts, settings), strict=True):
            if text.ends_with(proposal) and not self.judges_ends:
                text.take(proposal, len(proposal.token_ids))
            else:
                judged.append((text, proposal))
        for (text, proposal), logits in zip(judged, self._teachers_logits(judged, settings), strict=True):
            token_ids = proposal.token_ids
            place = self.teachers_place(token_ids, logits)
            text.take(proposal, len(token_ids) if place is None else place)
            if place is not None:
                text.take_teachers(logits[self.places(len(token_ids)).index(place)])

    def _proposals(self, texts: Sequence[_Text], settings: SamplingSettings) -> list[Completion]:
        """Of each text, by the student; without a token where it is not to go on."""
        counts = [self.proposal_tokens(t.request.seed, len(t.token_ids), t.room) for t in texts]
        requests = [text.continued(count) for text, count in zip(texts, counts, strict=True) if count]
        sampled = iter(self.context.sampler.generate(requests, settings) if requests else ())
        return [next(sampled) if count else Completion((), (), "length") for count in counts]

    def _teachers_logits(self, judged: Sequence[_Proposal], settings: SamplingSettings) -> Iterator[torch.Tensor]:
        """Of each proposal, at the places that the teacher is asked about."""
        if not judged:
            return
        scores = self._teacher_reads(judged)
        head = scores[0].head
        rows = head.weight.shape[0]
        asked = [
            one.states[self.places(len(proposal.token_ids))] for one, (_, proposal) in zip(scores, judged, strict=True)
        ]
        most = max(map(len, asked))
        at_once = max(1, loss_chunk_bytes(head.weight.device.type) // (4 * rows * most))  # texts
        for start in range(0, len(asked), at_once):
            part = asked[start : start + at_once]
            logits = head_logits(torch.cat(part), head)[:, : settings.shared_vocab or rows]
            yield from logits.split([len(states) for states in part])

    @torch.no_grad()
    def _teacher_reads(self, judged: Sequence[_Proposal]) -> list[HiddenScores]:
        """States that predict each token of the proposals and the one behind: [n + 1, H_teacher]."""
        rollouts: list[Rollout] = []
        for text, proposal in judged:
            behind = (*proposal.token_ids, 0)  # whichever it is
            rollouts.append(Rollout(text.as_draw(), self.name, behind))
        return [scores for scores in self.context.teacher_scores(rollouts) if isinstance(scores, HiddenScores)]


def draw_token(logits: torch.Tensor, seed: int) -> int:
    """From softmax of `logits` [V], by the Gumbel-max trick (Maddison et al. 2014, arXiv 1411.0030)."""
    noise = torch.empty(len(logits), dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    return int((logits.cpu().double() - noise.log()).argmax())
