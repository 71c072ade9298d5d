"""The engine's thread when what it drives, vLLM, fails: nobody waits for ever."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gkd.engines import prefill
from gkd.engines.prefill import PrefillEngine, PrefillSettings
from gkd.errors import ModelError

SETTINGS = PrefillSettings("float32", None, 1, 0.9, 1.0)
pytestmark = [pytest.mark.fault, pytest.mark.vllm]


class FailingVllm:
    """Refuses sequences of one token, and breaks in a step once it is told to."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=8)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.may_break = threading.Event()

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        if len(prompt["prompt_token_ids"]) == 1:
            raise ValueError("too short for me")

    def step(self) -> list[Any]:
        assert self.may_break.wait(10)
        raise RuntimeError("out of memory")


def test_a_failure_reaches_everyone_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("vllm")  # which the engine's thread needs for a request, and takes seconds
    vllm, told = FailingVllm(), threading.Event()
    monkeypatch.setattr(prefill, "_start", lambda *_: vllm)
    subject = PrefillEngine("model", SETTINGS, revision=None, on_failure=told.set)
    assert subject.max_tokens == 8
    with pytest.raises(RuntimeError, match="vLLM refused the sequence: too short for me"):
        subject.submit([1]).result(10)
    assert subject.is_alive and not told.is_set()
    waiting = [subject.submit([1, 2]) for _ in range(3)]
    vllm.may_break.set()
    for states in waiting:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            states.result(10)
    assert told.is_set() and not subject.is_alive
    with pytest.raises(RuntimeError, match="has stopped"):
        subject.submit([1, 2]).result(10)
    subject.close()


def test_a_model_that_does_not_start_is_raised_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("vLLM cannot serve it")

    monkeypatch.setattr(prefill, "_start", refuse)
    with pytest.raises(ModelError, match="cannot serve it"):
        PrefillEngine("model", SETTINGS, revision=None, on_failure=lambda: None)
