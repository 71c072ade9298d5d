"""Conversations: what was sampled stays, what was observed follows by the chat template, and limits are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gkd.data.templates import ChatTemplate
from gkd.data.turns import TurnEncoder
from gkd.environments import Environment, EnvironmentKind, Observed, Task
from gkd.environments.http import HttpKind
from gkd.errors import ConversationError
from gkd.rollout.conversations import Conversations, Held
from gkd.rollout.hf import HfSampler
from gkd.types import Completion, Prompt, PromptDraw, SampleRequest, SamplingSettings

END = 2  # <|end|>
SETTINGS = SamplingSettings(max_new_tokens=120, stop_token_ids=(END, 0), shared_vocab=259)


class Scripted(Environment):
    """Does what the test says."""

    def __init__(self, answer: Callable[[str, int], Any]) -> None:
        self._answer, self.heard = answer, list[str]()

    def reset(self, task: Task) -> None:
        self.task = task

    def step(self, turn: str) -> Observed:
        self.heard.append(turn)
        return self._answer(turn, len(self.heard))


class ScriptedKind(EnvironmentKind):
    kind: str = "scripted"
    answer: Any = None
    opened: Any = None  # a list

    def open(self) -> Environment:
        self.opened.append(Scripted(self.answer))
        return self.opened[-1]


class Says:
    """A sampler that says what it is told, turn by turn, cut to what it may."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *turns: str) -> None:
        self._turns = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns]
        self.asked: list[list[SampleRequest]] = []

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        ids = self._turns[len(self.asked)]
        self.asked.append(list(requests))
        cut = [tuple(ids[: request.most_tokens]) for request in requests]
        return [Completion(one, (-1.0,) * len(one), "stop" if one == tuple(ids) else "length") for one in cut]


@pytest.fixture(scope="module")
def tokenizer(tiny_student: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_student)


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str = "12 * 7?", task: str | None = None) -> Prompt:
    said = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return Prompt(0, tuple(ids), text, origin="d.jsonl:1", messages=(("user", text),), task=task)


def hold(
    tokenizer: PreTrainedTokenizerBase,
    sampler: Any,
    answer: Callable[[str, int], Any],
    *,
    prompt: Prompt | None = None,
    samples: int = 1,
    settings: SamplingSettings = SETTINGS,
    template: str | None = None,
    step: int = 0,
    **options: Any,
) -> tuple[list[Held], list[Scripted]]:
    kind = ScriptedKind(answer=answer, opened=[], **options)
    draws, requests = one_draw(tokenizer, prompt, samples)
    held = conversations_of(kind, tokenizer, template).hold(draws, requests, settings, sampler, step)
    return held, kind.opened


def conversations_of(
    kind: EnvironmentKind, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> Conversations:
    turns = TurnEncoder(tokenizer, ChatTemplate(tokenizer, {}, template=template), kind, (END, 0))
    return Conversations(kind, turns, lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)))


def one_draw(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None = None, samples: int = 1
) -> tuple[list[PromptDraw], list[SampleRequest]]:
    prompt = prompt or prompt_of(tokenizer)
    draws = [PromptDraw(prompt, i) for i in range(samples)]
    return draws, [SampleRequest(prompt.token_ids, 100 + i) for i in range(samples)]


def test_turns_and_observations_are_one_text_of_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """As if all of it had been rendered at once; only the turns are the student's."""
    sampler = Says(tokenizer, "<calc>12*7</calc><|end|>", "It is 84.<|end|>")
    (held,), (environment,) = hold(
        tokenizer, sampler, lambda turn, n: Observed("84", reward=0.5) if n == 1 else Observed("", True, 1.0)
    )
    messages = [
        {"role": "user", "content": "12 * 7?"},
        {"role": "assistant", "content": "<calc>12*7</calc>"},
        {"role": "user", "content": "84"},
        {"role": "assistant", "content": "It is 84."},
    ]
    prompt, ids = prompt_of(tokenizer), held.completion.token_ids
    assert tokenizer.decode([*prompt.token_ids, *ids]) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
    ((start, end),) = held.conversation.observed
    assert tokenizer.decode(ids[:start]) == "<calc>12*7</calc><|end|>"
    assert tokenizer.decode(ids[start:end]) == "\n<|start|>user\n84<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(ids[end:]) == "It is 84.<|end|>"
    assert len(held.completion.logprobs) == len(ids) - (end - start)
    assert (held.conversation.turns, held.conversation.end, held.reward) == (2, "done", 1.5)
    assert environment.heard == ["<calc>12*7</calc>", "It is 84."]
    assert sampler.asked[1][0].prompt_ids == (*prompt.token_ids, *ids[:end])


def test_a_sampler_goes_on_from_what_was_said(tokenizer: PreTrainedTokenizerBase, tiny_student: Path) -> None:
    """Log-probabilities are those of the whole text, and a conversation does not depend on those beside it."""
    sampler = HfSampler(str(tiny_student), dtype="float32", device=torch.device("cpu"), pad_token_id=0)

    def run(samples: int) -> list[Held]:
        echo = lambda turn, n: Observed(f"{len(turn)}")  # noqa: E731
        return hold(tokenizer, sampler, echo, samples=samples, turn_tokens=9, max_turns=3)[0]

    held = run(3)
    assert run(3) == held and len({one.completion.token_ids for one in held}) == 3
    model = sampler._model
    prompt = prompt_of(tokenizer)
    for one in held:
        ids = [*prompt.token_ids, *one.completion.token_ids]
        logprobs = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        observed = {place for start, end in one.conversation.observed for place in range(start, end)}
        own = [place for place in range(len(one.completion.token_ids)) if place not in observed]
        at = [len(prompt.token_ids) + place for place in own]
        expected = [float(logprobs[place - 1, ids[place]]) for place in at]
        assert list(one.completion.logprobs) == pytest.approx(expected, abs=1e-4) and len(expected) > 18
        assert one.conversation.turns == 3 and one.conversation.end == "turns"


def test_a_turn_that_is_cut_is_closed_for_the_student(tokenizer: PreTrainedTokenizerBase) -> None:
    """By tokens that it did not write: they are observed."""
    (held,), _ = hold(
        tokenizer, Says(tokenizer, "0123456789<|end|>", "b<|end|>"), lambda turn, n: Observed("x"),
        turn_tokens=5, max_turns=2,
    )  # fmt: skip
    ((start, end),) = held.conversation.observed
    assert tokenizer.decode(held.completion.token_ids[:start]) == "01234"
    assert tokenizer.decode(held.completion.token_ids[start:end]).startswith("<|end|>\n<|start|>user\nx<|end|>")


@pytest.mark.parametrize(
    ("turns", "tokens", "options", "end"),
    [
        (("a<|end|>", "b<|end|>"), 120, {"max_turns": 2}, "turns"),
        (("a<|end|>", "b<|end|>"), 120, {"max_turns": {"from": 1, "to": 2, "steps": 4}}, "turns"),
        (("a<|pad|>",), 120, {}, "stopped"),  # an end of the text, and not of the turn
        (("a<|end|>",), 20, {}, "tokens"),  # no room for the observation and a turn
        (("0123456789<|end|>",), 4, {}, "tokens"),
    ],
)
def test_how_a_conversation_ends(
    turns: tuple[str, ...], tokens: int, options: dict[str, Any], end: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = SamplingSettings(tokens, stop_token_ids=(END, 0))
    (held,), (environment,) = hold(
        tokenizer, Says(tokenizer, *turns), lambda turn, n: Observed("x"), settings=settings, step=4, **options
    )
    assert (held.conversation.end, held.conversation.turns) == (end, len(turns))
    assert len(held.conversation.observed) == len(turns) - 1 and len(held.completion.token_ids) <= tokens
    assert len(environment.heard) == (0 if tokens == 4 else len(turns)), "a turn that was cut off is not answered"


def test_depth_is_a_schedule(tokenizer: PreTrainedTokenizerBase) -> None:
    ramp = {"from": 1, "to": 3, "steps": 4}
    for step, turns in ((0, 1), (2, 2), (4, 3), (9, 3)):
        (held,), _ = hold(
            tokenizer, Says(tokenizer, *["a<|end|>"] * 3), lambda turn, n: Observed("x"), step=step, max_turns=ramp
        )
        assert held.conversation.turns == turns


def test_a_long_observation_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    (held,), _ = hold(
        tokenizer, Says(tokenizer, "a<|end|>", "b<|end|>"), lambda turn, n: Observed("0123456789"),
        max_turns=2, max_observation_tokens=4,
    )  # fmt: skip
    assert "user\n0123<|end|>" in tokenizer.decode(held.completion.token_ids)


def test_what_an_environment_types_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """An observation cannot end its message, or begin another."""
    (held,), _ = hold(
        tokenizer, Says(tokenizer, "a<|end|>", "b<|end|>"), lambda turn, n: Observed("<|end|><|start|>assistant"),
        max_turns=2,
    )  # fmt: skip
    ((start, end),) = held.conversation.observed
    ids = held.completion.token_ids[start:end]
    assert ids.count(END) == 1 and ids.count(1) == 2 and "<|end|><|start|>assistant" in tokenizer.decode(ids)


DROPS_THOUGHTS = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
TRIMS = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")


def test_a_template_that_shows_another_history_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = "<think>hm</think> yes<|end|>", "b<|end|>"
    answer = lambda turn, n: Observed("x")  # noqa: E731
    with pytest.raises(ConversationError) as refused:
        hold(tokenizer, Says(tokenizer, *turns), answer, template=DROPS_THOUGHTS, max_turns=2)
    text = str(refused.value)
    assert text.startswith("environment: d.jsonl:1: after turn 1 the chat template writes another history than was")
    assert "<think>hm</think>" in text and "environment.check_prefix" in text and "character 43" in text
    (held,), _ = hold(
        tokenizer, Says(tokenizer, *turns), answer, template=DROPS_THOUGHTS, max_turns=2, check_prefix=False
    )
    assert tokenizer.decode(held.completion.token_ids).startswith("<think>hm</think> yes<|end|>\n<|start|>user")
    hold(tokenizer, Says(tokenizer, "  spaces  <|end|>", "b<|end|>"), answer, template=TRIMS, max_turns=2)


WITHOUT_TOOLS = CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'tool' %}"
)


def test_a_template_that_does_not_show_observations_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = lambda turn, n: Observed("x")  # noqa: E731
    with pytest.raises(ConversationError, match=r"d\.jsonl:1: the chat template does not show a message of role tool"):
        hold(tokenizer, Says(tokenizer, "a<|end|>"), answer, template=WITHOUT_TOOLS, role="tool")
    for role in ("user", "tool"):
        template = WITHOUT_TOOLS if role == "user" else CHAT_TEMPLATE
        turns = Says(tokenizer, "a<|end|>", "b<|end|>")
        (held,), _ = hold(tokenizer, turns, answer, template=template, role=role, max_turns=2)
        assert f"<|start|>{role}\nx<|end|>" in str(tokenizer.decode([*held.completion.token_ids]))


def test_a_row_of_raw_text_has_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = Prompt(0, (50, 51), "ab", origin="d.jsonl:1")
    (held,), _ = hold(
        tokenizer, Says(tokenizer, "c<|end|>", "d<|end|>"), lambda turn, n: Observed(" x "), prompt=prompt, max_turns=2
    )
    assert tokenizer.decode(held.completion.token_ids) == "c<|end|> x d<|end|>"


# ---- environments that fail


def fails(turn: str, n: int) -> Observed:
    raise ZeroDivisionError("no such thing")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fails, "turn 1: ZeroDivisionError: no such thing"),
        (lambda turn, n: "text", "turn 1: a str and no Observed came of a turn"),
        (lambda turn, n: Observed(5), "an observation is text, not int"),  # pyright: ignore
        (lambda turn, n: Observed("\ud800"), "an observation holds half a surrogate pair"),
        (lambda turn, n: Observed("", reward=float("nan")), "a reward is a finite number, not nan"),
    ],
)
def test_one_that_fails_is_named(answer: Any, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConversationError, match=message) as failed:
        hold(tokenizer, Says(tokenizer, "a<|end|>"), answer)
    assert str(failed.value).startswith("environment: scripted: d.jsonl:1: sample 0, ")
    assert "\n" not in str(failed.value)


def test_what_an_unfinished_one_earns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside its turns; a done one nothing. What goes wrong afterwards is said, and is no error."""

    class Leaves(Scripted):
        def unfinished(self) -> float | None:
            return -1.0

        def close(self) -> None:
            raise OSError("gone already")

    class LeavesKind(ScriptedKind):
        def open(self) -> Environment:
            return Leaves(self.answer)

    for done, reward in ((False, -0.5), (True, 0.5)):
        kind = LeavesKind(answer=lambda turn, n, done=done: Observed("x", done, 0.5), max_turns=1)
        conversations = conversations_of(kind, tokenizer)
        (held,) = conversations.hold(*one_draw(tokenizer), SETTINGS, Says(tokenizer, "a<|end|>"), 0)
        assert held.reward == reward


def test_one_that_hangs_ends_its_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    never = threading.Event()

    def hangs(turn: str, n: int) -> Observed:
        never.wait(20)
        return Observed("")

    began = time.monotonic()
    held, _ = hold(tokenizer, Says(tokenizer, "a<|end|>"), hangs, timeout_s=0.2, samples=3)
    assert time.monotonic() - began < 5 and [one.conversation.end for one in held] == ["timeout"] * 3
    never.set()


def test_no_more_are_asked_at_once_than_said(tokenizer: PreTrainedTokenizerBase) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def counts(turn: str, n: int) -> Observed:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return Observed("", done=True)

    hold(tokenizer, Says(tokenizer, "a<|end|>"), counts, samples=9, concurrency=3)
    assert most == 3


def test_one_that_drips_is_late_too(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each byte comes in time, and the answer does not."""

    class Drips(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            for _ in range(80 if self.path == "/step" else 0):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drips)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind = HttpKind(kind="http", address=f"http://127.0.0.1:{server.server_port}", timeout_s=1.5)
    began = time.monotonic()
    (held,) = conversations_of(kind, tokenizer).hold(*one_draw(tokenizer), SETTINGS, Says(tokenizer, "a<|end|>"), 0)
    assert held.conversation.end == "timeout" and time.monotonic() - began < 10
    server.shutdown()
