"""Texts that student and teacher draw together are drawn from the distribution that is said, by either engine."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd.config import RolloutConfig, make_config
from gkd.errors import ConfigError
from gkd.measures.samples import generated_tokens
from gkd.models import load_causal_lm
from gkd.registry import SOURCES
from gkd.rollout.base import Sampler
from gkd.rollout.hf import HfSampler
from gkd.rollout.mixture import teacher_tokens
from gkd.rollout.sources import Scores, SourceContext
from gkd.teacher.local import LocalTeacher
from gkd.teacher.views import WithViews
from gkd.types import Completion, HiddenScores, OutputHead, Prompt, PromptDraw, Rollout, SampleRequest, SamplingSettings

Text = tuple[int, ...]
NextToken = Callable[[Text], torch.Tensor]  # probabilities [IDS] in float64, given the text so far
IDS, STOP, LENGTH = 3, 2, 3  # the first ids alone: 0, 1 and 2, which ends a text
SETTINGS = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=(STOP,), shared_vocab=IDS)
OUTCOMES = [
    text
    for count in range(1, LENGTH + 1)
    for text in itertools.product(range(IDS), repeat=count)
    if STOP not in text[:-1] and (count == LENGTH or text[-1] == STOP)
]


def of_mixture(share: float, student: NextToken, teacher: NextToken) -> NextToken:
    return lambda text: share * teacher(text) + (1 - share) * student(text)


def corrected(top_k: int, student: NextToken, teacher: NextToken) -> NextToken:
    def next_token(text: Text) -> torch.Tensor:
        own, other = student(text), teacher(text)
        kept = torch.where(other >= other.sort(descending=True).values[top_k - 1], own, 0.0)
        return kept + (1 - kept.sum()) * other

    return next_token


def chances(next_token: NextToken) -> dict[Text, float]:
    return {
        text: math.prod(float(next_token(text[:place])[token]) for place, token in enumerate(text)) for text in OUTCOMES
    }


def drawn(
    source: str, draws: Sequence[PromptDraw], sampler: Any, scores: Scores, options: dict[str, Any], step: int = 0
) -> list[Rollout]:
    """`options` are those of the source."""
    context = SourceContext(
        sampler=sampler,
        settings=lambda step: SETTINGS,
        teacher_completion=lambda request: pytest.fail("no teacher's text was asked for"),
        seed=5,
        prompts={},
        options=RolloutConfig.model_validate({source: options}),
        teacher_scores=scores,
    )
    return SOURCES[source](source, context).complete(draws, step)


CASES = [
    ("mixed", {"teacher_share": 0.3}),
    *(("speculative", {"top_k": 1, "block_tokens": block}) for block in (1, 2, 3, 8)),
    *(("speculative", {"top_k": 2, "block_tokens": block}) for block in (1, 3)),
]


def law(source: str, options: dict[str, Any], student: NextToken, teacher: NextToken) -> dict[Text, float]:
    if source == "mixed":
        return chances(of_mixture(options["teacher_share"], student, teacher))
    return chances(corrected(options["top_k"], student, teacher))


# ---- by enumeration


class Choices:
    """Goes, in one run after another, through all that chance may decide in a program."""

    def __init__(self) -> None:
        self._path: list[tuple[int, int]] = []  # (what was chosen, of how many)
        self._place, self.chance = 0, 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        if self._place == len(self._path):
            self._path.append((0, len(probabilities)))
        chosen = self._path[self._place][0]
        self._place += 1
        self.chance *= probabilities[chosen]
        return chosen

    def go_on(self) -> bool:
        """To the next run; False: there is none."""
        while self._path and self._path[-1][0] + 1 == self._path[-1][1]:
            self._path.pop()
        if self._path:
            self._path[-1] = (self._path[-1][0] + 1, self._path[-1][1])
        self._place, self.chance = 0, 1.0
        return bool(self._path)


class Enumerated:
    """Student, teacher and coins whose draws are choices. Every draw must have a seed of its own."""

    weights_version = 0

    def __init__(self, choices: Choices, student: NextToken, teacher_logits: dict[Text, torch.Tensor]) -> None:
        self._choices, self._student, self._teacher_logits = choices, student, teacher_logits
        self.seeds: list[Any] = []

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        (request,) = requests
        self.seeds.append(request.seed)
        text = request.prompt_ids[1:]
        tokens: Text = ()
        while len(tokens) < request.limited(settings).max_new_tokens and STOP not in tokens:
            tokens += (self._choices.choose(self._student(text + tokens).tolist()),)
        return [Completion(tokens, (-1.0,) * len(tokens), "stop" if STOP in tokens else "length")]

    def scores(self, rollouts: Sequence[Rollout]) -> list[HiddenScores]:
        (rollout,) = rollouts
        text, behind = rollout.draw.prompt.token_ids[1:], rollout.completion_ids
        rows = [self._teacher_logits[text + behind[:place]] for place in range(len(behind))]
        return [HiddenScores(torch.stack(rows), OutputHead(torch.eye(IDS)))]

    def draw_token(self, logits: torch.Tensor, seed: int) -> int:
        self.seeds.append(seed)
        return self._choices.choose(logits.double().softmax(-1).tolist())

    def coin(self, seed: int, purpose: str, place: int) -> float:
        self.seeds.append((seed, purpose, place))
        return float(self._choices.choose([0.3, 0.7]))


@pytest.mark.parametrize(("source", "options"), CASES, ids=str)
def test_every_text_has_exactly_its_chance(
    source: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over everything that chance may decide. A block's length changes nothing."""
    generator = torch.Generator().manual_seed(2)
    own: dict[Text, torch.Tensor] = defaultdict(lambda: torch.randn(IDS, generator=generator).mul(1.5))
    other: dict[Text, torch.Tensor] = defaultdict(lambda: torch.randn(IDS, generator=generator).mul(1.5))

    def student(text: Text) -> torch.Tensor:
        return own[text].double().softmax(-1)

    def teacher(text: Text) -> torch.Tensor:
        return other[text].double().softmax(-1)

    choices, found = Choices(), defaultdict[Text, float](float)
    while True:
        world = Enumerated(choices, student, other)
        monkeypatch.setattr("gkd.rollout.sources.together.draw_token", world.draw_token)
        monkeypatch.setattr("gkd.rollout.sources.mixed.derive_uniform", world.coin)
        (rollout,) = drawn(source, [PromptDraw(Prompt(0, (9,), ""), 0)], world, world.scores, options)
        assert len(set(world.seeds)) == len(world.seeds)
        found[rollout.completion_ids] += choices.chance
        if not choices.go_on():
            break
    expected = law(source, options, student, teacher)
    assert found.keys() == expected.keys()
    assert all(found[text] == pytest.approx(chance, abs=1e-12) for text, chance in expected.items())
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    elsewhere = max(abs(chance - expected[text]) for text, chance in chances(student).items())
    assert elsewhere > 0.05, "else it would show nothing"


# ---- by samples of both engines

PROMPTS = [(7, 30, 31), (9,)]  # of two lengths, so that one is padded


def misfit(texts: Sequence[Text], expected: dict[Text, float]) -> float:
    """Chi-square by what one in a thousand samples exceeds; the rarest texts are one cell, of at least 5 expected."""
    counts = Counter(texts)
    assert counts.keys() <= expected.keys()
    cells = [(0, 0.0)]
    for text, p in sorted(expected.items(), key=lambda item: item[1]):
        own = counts[text], len(texts) * p
        if cells[-1][1] < 5:
            cells[-1] = cells[-1][0] + own[0], cells[-1][1] + own[1]
        else:
            cells.append(own)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 3.09 * spread**0.5) ** 3  # Wilson and Hilferty 1931
    return sum((count - mean) ** 2 / mean for count, mean in cells) / limit


def next_token_of(model: Any, prompt: Text) -> NextToken:
    @torch.no_grad()
    def next_token(text: Text) -> torch.Tensor:
        return model(torch.tensor([prompt + text])).logits[0, -1, :IDS].double().softmax(-1)

    return next_token


class Versioned:
    """An engine as a source sees it."""

    weights_version = 3

    def __init__(self, sampler: Sampler) -> None:
        self.generate = sampler.generate


class Pair:
    def __init__(self, student: Path, teacher: Path) -> None:
        self.student, self.teacher = (load_causal_lm(str(path), "float32").eval() for path in (student, teacher))
        self.scorer = LocalTeacher(self.teacher, device=torch.device("cpu"), micro_batch_size=512, pad_token_id=0)
        self.scores = self.scorer.score


@pytest.fixture(scope="module")
def pair(tiny_student: Path, tiny_teacher: Path) -> Pair:
    return Pair(tiny_student, tiny_teacher)


def assert_follows_its_law(
    sampler: Sampler, pair: Pair, source: str, options: dict[str, Any], count: int
) -> list[Rollout]:
    """`count` texts of each prompt."""
    draws = [PromptDraw(Prompt(i, prompt, ""), n) for n in range(count) for i, prompt in enumerate(PROMPTS)]
    found = drawn(source, draws, Versioned(sampler), pair.scores, options)
    assert [rollout.draw for rollout in found] == draws
    for own, prompt in enumerate(PROMPTS):
        texts = [rollout.completion_ids for rollout in found[own :: len(PROMPTS)]]
        student, teacher = next_token_of(pair.student, prompt), next_token_of(pair.teacher, prompt)
        assert misfit(texts, law(source, options, student, teacher)) < 1, "the seeds are fixed"
        assert misfit(texts, chances(student)) > 3, "else it would show nothing"
        other = {"teacher_share": 0.6, "top_k": 3 - options.get("top_k", 0)}
        assert misfit(texts, law(source, other, student, teacher)) > 3
    return found


@pytest.mark.parametrize(("source", "options"), [CASES[0], CASES[2], *CASES[5:]], ids=str)
def test_transformers_follows_the_law(source: str, options: dict[str, Any], pair: Pair, tiny_student: Path) -> None:
    cpu = torch.device("cpu")
    sampler = HfSampler(str(tiny_student), dtype="float32", device=cpu, pad_token_id=0, max_num_seqs=4000)
    found = assert_follows_its_law(sampler, pair, source, options, 2000)
    some = found[:100]
    for one in some[:6]:
        (alone,) = drawn(source, [one.draw], Versioned(sampler), pair.scores, options)
        assert alone.completion_ids == one.completion_ids, "the rest of the batch does not matter"
    again = drawn(source, [r.draw for r in some], Versioned(sampler), pair.scores, options, step=1)
    assert [r.completion_ids for r in again] != [r.completion_ids for r in some], "the step does"
    for rollout in some[:6]:
        assert (rollout.source, rollout.weights_version) == (source, 3)
        assert rollout.teacher_share == options.get("teacher_share", 0.0) and rollout.logprobs is not None
        with torch.no_grad():
            logits = pair.student(torch.tensor([rollout.token_ids])).logits[0]
        first = len(rollout.draw.prompt.token_ids) - 1
        for place, (token, logprob) in enumerate(zip(rollout.completion_ids, rollout.logprobs, strict=True)):
            own = float(logits[first + place].log_softmax(-1)[token])
            assert math.isnan(logprob) or logprob == pytest.approx(own, abs=1e-4)
    together, by_teacher = teacher_tokens(found)
    assert together == generated_tokens(found) == sum(len(rollout.completion_ids) for rollout in found)
    share = by_teacher / together
    assert 0.1 < share < 0.9 and (source != "mixed" or share == pytest.approx(0.3, abs=0.02))


@pytest.mark.parametrize(("source", "options"), [CASES[0], CASES[3]], ids=str)
def test_each_reads_its_own_context(source: str, options: dict[str, Any], pair: Pair, tiny_student: Path) -> None:
    cpu = torch.device("cpu")
    sampler = HfSampler(str(tiny_student), dtype="float32", device=cpu, pad_token_id=0, max_num_seqs=2000)
    (prompt, view), count = PROMPTS, 2000
    draws = [PromptDraw(Prompt(0, prompt, "", teacher_ids=view), n) for n in range(count)]
    found = drawn(source, draws, Versioned(sampler), WithViews(pair.scorer).score, options)
    texts = [rollout.completion_ids for rollout in found]
    student = next_token_of(pair.student, prompt)
    assert misfit(texts, law(source, options, student, next_token_of(pair.teacher, view))) < 1
    assert misfit(texts, law(source, options, student, next_token_of(pair.teacher, prompt))) > 3


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("source", "options"), [CASES[0], CASES[3]], ids=str)
def test_vllm_follows_the_law(source: str, options: dict[str, Any], pair: Pair, vllm_sampler: Sampler) -> None:
    vllm_sampler.update_weights(((name, p.detach()) for name, p in pair.student.named_parameters()), version=0)
    assert_follows_its_law(vllm_sampler, pair, source, options, 1500)


@pytest.mark.vllm
def test_vllm_reads_a_text_again_from_its_cache(
    pair: Pair, vllm_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt longer than a block of it (128 tokens), from the second round on."""
    run, rounds = vllm_sampler._run, []  # pyright: ignore[reportAttributeAccessIssue]

    def recorded(requests: Sequence[Any]) -> list[Any]:
        outputs = run(requests)
        rounds.append([output.num_cached_tokens for output in outputs])
        return outputs

    vllm_sampler.update_weights(((name, p.detach()) for name, p in pair.student.named_parameters()), version=0)
    monkeypatch.setattr(vllm_sampler, "_run", recorded)
    prompt = tuple(3 + (7 * i) % 250 for i in range(200))
    draws = [PromptDraw(Prompt(0, prompt, ""), n) for n in range(8)]
    drawn("speculative", draws, Versioned(vllm_sampler), pair.scores, {"top_k": 1, "block_tokens": 1})
    assert len(rounds) > 1 and all(cached == 128 for cached in rounds[1])


# ---- what is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rollout": {"temperature": 0.8}},
            r"rollout\.temperature: 0\.8 cannot draw the texts of mixture\.SOURCE; set",
        ),
        ({"rollout": {"top_k": 5}}, r"rollout\.top_k: 5 cannot draw"),
        ({"rollout": {"tensor_parallel": 2}}, r"rollout\.tensor_parallel: 2 cannot draw .*; set it to 1"),
        (
            {"rollout": {"placement": "served", "addresses": ["http://127.0.0.1:1"], "staleness": 1}},
            r"rollout\.staleness: 1 cannot draw",
        ),
        ({"teacher": {"model": "t", "placement": "sharded"}}, r"teacher\.placement: sharded cannot draw"),
        ({"other_teachers": {"b": {"model": "t", "weight": 0.5}}}, r"other_teachers: mixture\.SOURCE draws from one"),
        (
            {"objective": {"kind": "policy_gradient"}},
            r"objective\.on: policy_gradient is for the student's own samples, not for SOURCE",
        ),
    ],
)
@pytest.mark.parametrize("source", ["mixed", "speculative"])
def test_what_cannot_draw_together(source: str, sections: dict[str, Any], message: str) -> None:
    base = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    base |= {"mixture": {"student": 0.0, source: 1.0}}
    make_config(base)
    with pytest.raises(ConfigError, match=message.replace("SOURCE", source)):
        make_config({**base, **sections})


def test_only_the_weights_of_a_mixture_are_known() -> None:
    base = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    base |= {"objective": {"kind": "policy_gradient", "advantage": "teacher"}}
    make_config({**base, "mixture": {"student": 0.0, "mixed": 1.0}})
    with pytest.raises(ConfigError, match="not for speculative"):
        make_config({**base, "mixture": {"student": 0.0, "speculative": 1.0}})
