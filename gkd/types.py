"""What crosses a room's border.

Legend: B rows of a micro-batch, T positions, N scored tokens, M tokens of all sequences, V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:  # torch takes a second to import; these types must not
    import torch

FinishReason = Literal["stop", "length"]
ConversationEnd = Literal["done", "stopped", "turns", "tokens", "timeout"]
AlignmentKind = Literal["shared", "uld", "projection"]
LayerOutput = Literal["hidden", "query", "key", "value"]  # the last three: of a projection, before norms and rotary
WhichTokens = Literal["scored", "all"]  # of a sequence; all: of the prompt, and the scored ones
_NAME_IN_JSON = re.compile(r'"([A-Za-z0-9][\w.-]{0,63})"', re.ASCII)
Decode = Callable[[Sequence[int]], str]  # token ids to text that people read, special tokens kept


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data, rendered with the student's chat template and tokenised."""

    index: int  # row in the data set: stable across epochs, ranks and resumes
    token_ids: tuple[int, ...]
    text: str  # what the user wrote, for people to read; never tokenised again
    completion_ids: tuple[int, ...] | None = None  # the data set's own answer, end token included
    origin: str = ""  # "file:line", for messages
    weight: float = 1.0  # of the row in the loss's numerator, whoever completes it
    teacher: str = "main"  # which of several teaches it: gkd.config.MAIN_TEACHER, or a name of other_teachers
    teacher_ids: tuple[int, ...] | None = None  # its view: read in the place of `token_ids`; None: it reads these
    messages: tuple[tuple[str, str], ...] | None = None  # (role, content) of a conversation; None: raw text
    task: str | None = None  # JSON, of what an environment or a verifier has to know, or of a name
    is_translated: bool = False  # `teacher_ids` are tokens of a tokenizer of the teacher's own

    @property
    def task_name(self) -> str | None:
        """Of a task that is a name: what the metrics of its rows can be told apart by."""
        found = None if self.task is None else _NAME_IN_JSON.fullmatch(self.task)
        return None if found is None else found[1]

    @property
    def read_by_teacher(self) -> tuple[int, ...]:
        """The ids that its teacher reads before a completion."""
        return self.token_ids if self.teacher_ids is None else self.teacher_ids


@dataclass(frozen=True, slots=True)
class PromptDraw:
    """One sample that a step asks for: a prompt, and which of its samples."""

    prompt: Prompt
    sample_index: int


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    shared_vocab: int = 0  # ids from here on are never drawn: the other side lacks them; 0 = all may be


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A prompt for a sampler, and the seed that alone decides its completion."""

    prompt_ids: tuple[int, ...]
    seed: int
    most_tokens: int | None = None  # of the completion, where that is less than the settings say

    def limited(self, settings: SamplingSettings) -> SamplingSettings:
        """How this completion is drawn."""
        if self.most_tokens is None or self.most_tokens >= settings.max_new_tokens:
            return settings
        return replace(settings, max_new_tokens=self.most_tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler returns for one request.

    `token_ids` holds the stop token where one was produced. `logprobs` are the sampled tokens' natural
    log-probabilities under the model's own distribution: before temperature and truncation.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Conversation:
    """What an environment made of a completion: the student's turns, and between them what it observed.

    `end`: the environment was done; the student ended the text and not its turn; the turns or the tokens that it may
    have were used up; or the environment took too long.
    """

    observed: tuple[tuple[int, int], ...]  # places in the completion, from and to, that the student did not write
    turns: int
    end: ConversationEnd


class RewardGroup(NamedTuple):
    """Of the rewards of a prompt's samples in a step."""

    mean: float
    deviation: float


class Reward(NamedTuple):
    """A text's, beside those of its group; NaN where there is none."""

    value: float
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion that a step trains on: where it came from and, if sampled here, by which weights."""

    draw: PromptDraw
    source: str  # of gkd.registry.SOURCES
    completion_ids: tuple[int, ...]  # all that follows the prompt, observations of an environment among it
    logprobs: tuple[float, ...] | None = None  # of student samples' scored tokens; NaN of one that the teacher drew
    weights_version: int | None = None  # student samples only
    teacher_share: float = 0.0  # the teacher's in the distribution that each token was drawn from, beside the student's
    conversation: Conversation | None = None  # with an environment; None: all of the completion is scored
    reward: float | None = None  # of an environment; None: nobody judged it
    reward_group: RewardGroup | None = None  # of the student's samples in the step, where a term goes by it

    @property
    def sample_id(self) -> str:
        return f"prompt {self.draw.prompt.index} sample {self.draw.sample_index} ({self.source})"

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.draw.prompt.token_ids + self.completion_ids

    @property
    def turns(self) -> list[range]:
        """Places in the completion of what stands between observations: all that is scored."""
        observed = () if self.conversation is None else self.conversation.observed
        starts = [0, *(end for _, end in observed)]
        ends = [*(start for start, _ in observed), len(self.completion_ids)]
        return [range(start, end) for start, end in zip(starts, ends, strict=True)]

    @property
    def scored_places(self) -> Sequence[int]:
        """In the completion, of the tokens that a loss counts."""
        if self.conversation is None:
            return range(len(self.completion_ids))
        return [place for turn in self.turns for place in turn]

    @property
    def scored_ids(self) -> tuple[int, ...]:
        if self.conversation is None:
            return self.completion_ids
        return tuple(self.completion_ids[place] for place in self.scored_places)

    def as_its_teacher_reads(self) -> Rollout:
        """The same completion, token by token, behind what the prompt's teacher reads in the prompt's place."""
        prompt = self.draw.prompt
        if prompt.teacher_ids is None:
            return self
        return replace(self, draw=replace(self.draw, prompt=replace(prompt, token_ids=prompt.teacher_ids)))


@dataclass(frozen=True)
class OutputHead:
    """The last map of a language model: logits = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None  # logits -> softcap * tanh(logits / softcap)

    def first(self, count: int) -> OutputHead:
        """Of so many tokens."""
        return replace(self, weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides which states a model has."""

    layers: int
    hidden: int  # width of the states between layers
    projections: tuple[int, int, int] | None = None  # of query, key and value; None: not of every layer, or joined

    def width(self, output: LayerOutput) -> int:
        """Raises ValueError where the model has no such projections."""
        if output == "hidden":
            return self.hidden
        if self.projections is None:
            raise ValueError("not every layer has q_proj, k_proj and v_proj")
        return self.projections[("query", "key", "value").index(output)]


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where in a model states are read.

    Layers count as in transformers' `hidden_states`: 0 is what the first layer reads, i what the i-th gives on, and
    the last, after the final norm, what the output head reads; projections are those of the i-th layer.
    `scored`: at the positions that predict scored tokens.
    """

    layer: int
    tokens: WhichTokens = "scored"
    output: LayerOutput = "hidden"

    @property
    def source(self) -> tuple[LayerOutput, int]:
        """Whatever the tokens."""
        return self.output, self.layer


@dataclass(frozen=True, slots=True)
class StatePair:
    """States of the student that a term compares with states of the teacher."""

    student: StatePlace
    teacher: StatePlace
    student_width: int
    teacher_width: int
    is_projected: bool = False  # the student's, to the teacher's width, by a map that is learned


StatePairs: TypeAlias = Mapping[str, Sequence[StatePair]]  # of each term, by its name


def _no_states() -> dict[StatePlace, torch.Tensor]:
    return {}


@dataclass(frozen=True)
class HiddenScores:
    """A teacher's whole distribution of N tokens: its states at the positions that predict them, and its head."""

    states: torch.Tensor  # [N, H_teacher]
    head: OutputHead
    layer_states: Mapping[StatePlace, torch.Tensor] = field(
        default_factory=_no_states
    )  # [N or M, H_teacher], where asked for

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device) -> HiddenScores:
        return self._map(lambda states: states.to(device))

    def first(self, count: int) -> HiddenScores:
        """So many rows of everything."""
        return self._map(lambda states: states[:count])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HiddenScores:
        layers = {place: change(states) for place, states in self.layer_states.items()}
        return HiddenScores(change(self.states), self.head, layers)

    def of_rows(self, scored: torch.Tensor, every: torch.Tensor) -> HiddenScores:
        """Some of the rows [N]; `every`: of layer states of all tokens, [M]."""
        layers = {
            place: states[scored if place.tokens == "scored" else every] for place, states in self.layer_states.items()
        }
        return HiddenScores(self.states[scored], self.head, layers)


@dataclass(frozen=True)
class TopkScores:
    """The K tokens that a teacher finds most likely in the place of each of N tokens, at temperature 1."""

    ids: torch.Tensor  # [N, K] int64
    log_probs: torch.Tensor  # [N, K] float32: natural, over the teacher's whole vocabulary

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> TopkScores:
        return TopkScores(self.ids.to(device), self.log_probs.to(device))


@dataclass(frozen=True)
class NoScores:
    """Nothing, of N tokens: where no term of the objective asks a teacher."""

    tokens: int

    def __len__(self) -> int:
        return self.tokens

    def to(self, device: torch.device) -> NoScores:
        return self


@dataclass(frozen=True, eq=False)  # one object a teacher, known by itself
class Alignment:
    """How a teacher with another tokenizer is compared, and which of its ids stands for which of the student's.

    projection: several of the student's may go to one of the teacher's.
    """

    kind: AlignmentKind
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]  # of each of these
    shared: tuple[tuple[int, int], ...]  # (student's id, teacher's): the same bytes, or control tokens of one role


@dataclass(frozen=True)
class AlignedScores:
    """What a teacher with another tokenizer says of N tokens: its whole distribution of M of its own, which spell them.

    A span holds tokens of both that spell the same bytes: those with its number. -1 is in none. What is not of the
    model's width stays on the CPU.
    """

    states: torch.Tensor  # [M, H_teacher]
    head: OutputHead
    labels: torch.Tensor  # [M] int64: the teacher's tokens
    spans: torch.Tensor  # [M] int64: the span of each, from 0
    student_spans: torch.Tensor  # [N] int64
    alignment: Alignment

    def __len__(self) -> int:
        return len(self.student_spans)

    @property
    def span_count(self) -> int:
        return int(self.spans[-1]) + 1 if len(self.spans) else 0

    def to(self, device: torch.device) -> AlignedScores:
        return replace(self, states=self.states.to(device))

    def first(self, count: int) -> AlignedScores:
        """Of so many tokens, and of the spans that end among them."""
        cut = self.student_spans[count:]
        spans = int(cut[cut >= 0].min()) if bool((cut >= 0).any()) else self.span_count
        rows, of_student = int((self.spans < spans).sum()), self.student_spans[:count]
        of_student = of_student.masked_fill(of_student >= spans, -1)
        labels, numbers = self.labels[:rows], self.spans[:rows]
        return AlignedScores(self.states[:rows], self.head, labels, numbers, of_student, self.alignment)


# What a teacher says of one rollout's completion, or of the scored tokens of a micro-batch: row j is of token j, but of
# AlignedScores.
TeacherScores: TypeAlias = HiddenScores | AlignedScores | TopkScores | NoScores


def first_rows(scores: TeacherScores, count: int) -> TeacherScores:
    """What the same teacher says of the first `count` tokens."""
    if isinstance(scores, HiddenScores | AlignedScores):
        return scores.first(count)
    if isinstance(scores, NoScores):
        return NoScores(min(scores.tokens, count))
    return TopkScores(scores.ids[:count], scores.log_probs[:count])


@dataclass(frozen=True)
class TokenView:
    """Tokens of a micro-batch whose states are looked at; those of a sequence stand together."""

    index: torch.Tensor  # int64 into B*T
    weights: torch.Tensor  # float32: of the row, in a term's numerator
    counts: tuple[int, ...]  # of each sequence

    def to(self, device: torch.device) -> TokenView:
        return TokenView(self.index.to(device), self.weights.to(device), self.counts)


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, ready for the student. Only completion tokens are scored, and none that was observed.

    Either one sequence a row, padded on the right, so that the causal mask alone keeps padding out of every state
    that is used; or packed: one row (B = 1) with the sequences end to end.
    """

    input_ids: torch.Tensor  # [B, T] int64
    score_index: torch.Tensor  # [N] int64 into B*T: the position whose output predicts the scored token
    labels: torch.Tensor  # [N] int64: the scored tokens
    weights: torch.Tensor  # [N] float32: of the row, in every term's numerator
    sampler_logprobs: torch.Tensor  # [N] float32: the sampler's own of student samples, NaN elsewhere
    sequence_index: torch.Tensor  # [N] int64 into `sample_ids`: the token's sequence
    teacher: TeacherScores | None  # of N tokens, by one teacher
    sample_ids: tuple[str, ...]  # one name a sequence, for messages
    sources: tuple[str, ...]  # where each sequence's completion comes from
    completion_lengths: tuple[int, ...]  # scored tokens of each sequence, which stand together in N
    sequence_lengths: tuple[int, ...] | None = None  # packed: tokens of each sequence in the row; None: padded rows
    teacher_share: torch.Tensor | None = None  # [N] float32: of each token's rollout; None: 0
    reference: HiddenScores | None = None  # of N tokens, by the initial student, where a term compares with it
    rewards: tuple[Reward, ...] | None = None  # of each sequence; None: nobody judged any
    every_token: TokenView | None = None  # of prompts and scored tokens, where there are such; it weighs what those do
    tasks: tuple[str | None, ...] = ()  # of each sequence its prompt's `task_name`

    @property
    def scored_tokens(self) -> int:
        return self.labels.numel()

    @property
    def sequence_rewards(self) -> list[float] | None:
        """Of each sequence, NaN of one that nobody judged; None: nobody judged any."""
        return None if self.rewards is None else [reward.value for reward in self.rewards]

    def view(self, tokens: WhichTokens) -> TokenView:
        """Where states of such tokens are found."""
        if tokens == "scored":
            return TokenView(self.score_index, self.weights, self.completion_lengths)
        assert self.every_token is not None
        return self.every_token

    def to(self, device: torch.device) -> TokenBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()})


class WeightStream(Protocol):
    """The student's weights as they leave the trainer, one whole parameter at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's Hugging Face name and full shape; a tied head is named once."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        """The trainer's own log-probabilities of `token_ids[start:]`, each given all before it."""
        ...

    def exact_logprobs(self, token_ids: Sequence[int], start: int) -> list[float] | None:
        """The same computed in float32, whatever dtype the trainer computes in; None where its weights are not."""
        ...
