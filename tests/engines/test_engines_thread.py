"""The engine's thread: what runs together, what waits for what, and what an error reaches."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gkd.engines.thread import EngineThread


class CountingVllm:
    """Finishes every request in its third step; may be held up before a step."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=8)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.may_step = threading.Event()
        self.requests: dict[str, list[Any]] = {}
        self.most_at_once = 0

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.requests[request_id] = [prompt, 0]
        self.most_at_once = max(self.most_at_once, len(self.requests))

    def step(self) -> list[Any]:
        assert self.may_step.wait(10)
        outputs = []
        for request_id, request in list(self.requests.items()):
            request[1] += 1
            outputs.append(SimpleNamespace(request_id=request_id, finished=request[1] == 3, prompt=request[0]))
            if request[1] == 3:
                del self.requests[request_id]
        return outputs


@pytest.fixture
def vllm() -> CountingVllm:
    return CountingVllm()


@pytest.fixture
def thread(vllm: CountingVllm) -> EngineThread:
    return EngineThread(lambda: vllm, name="test", on_failure=lambda: None)


def prompt_of(output: Any) -> Any:
    return output.prompt


def test_a_call_alone_waits_for_what_came_before_and_holds_up_what_comes_after(
    vllm: CountingVllm, thread: EngineThread
) -> None:
    before = [thread.submit(lambda i=i: (i, None), prompt_of) for i in range(3)]
    alone = thread.run_alone(lambda engine: (len(engine.requests), [b.done() for b in before]))
    after = thread.submit(lambda: ("after", None), prompt_of)
    assert not alone.done() and not after.done()
    vllm.may_step.set()
    assert alone.result(10) == (0, [True] * 3)
    assert [b.result(10) for b in before] == [0, 1, 2] and after.result(10) == "after"
    assert vllm.most_at_once == 3
    thread.close()


def test_an_output_that_cannot_be_used_is_an_error_of_its_request(vllm: CountingVllm, thread: EngineThread) -> None:
    vllm.may_step.set()
    bad, good = (thread.submit(lambda i=i: (i, None), lambda output: 1 // output.prompt) for i in (0, 1))
    with pytest.raises(ZeroDivisionError):
        bad.result(10)
    assert good.result(10) == 1 and thread.is_alive
    thread.close()


def test_an_error_of_one_request_or_call_is_its_own(vllm: CountingVllm, thread: EngineThread) -> None:
    vllm.may_step.set()

    def fails(*_: object) -> Any:
        raise KeyError("mine")

    for future in (thread.submit(fails, prompt_of), thread.run_alone(fails)):
        with pytest.raises(KeyError, match="mine"):
            future.result(10)
    assert thread.is_alive and thread.submit(lambda: ("fine", None), prompt_of).result(10) == "fine"
    thread.close()


def test_a_stop_comes_after_everything_that_arrived_before_it(vllm: CountingVllm, thread: EngineThread) -> None:
    waiting = [thread.submit(lambda: ("x", None), prompt_of), thread.run_alone(lambda _: "y")]
    threading.Timer(0.1, vllm.may_step.set).start()
    thread.close()
    assert [future.result(0) for future in waiting] == ["x", "y"]
