"""Where teachers and sampler are: every placement of the config is there, and servers are asked once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scores import whole
from teacher_servers import Answer, Answering, FakeServer, causal_states, read_ids, rollout

from gkd.config import Config, RolloutConfig, TeacherConfig, make_config
from gkd.engines.sampling import SamplerSpec
from gkd.errors import ConfigError
from gkd.models import model_fingerprint, read_config
from gkd.models.head_bytes import head_to_bytes
from gkd.rollout import placements as sampler_placements
from gkd.serving import sampler_protocol, teacher_protocol
from gkd.serving.sampler_protocol import architecture_digest
from gkd.teacher import placements as teacher_placements
from gkd.train.placements import ask_placements
from gkd.types import OutputHead

CPU, HIDDEN = torch.device("cpu"), 8
SITE = teacher_placements.Site(CPU, world_size=1, pad_token_id=0, agree_on_largest=lambda count: count)
Start = Callable[[dict[str, Any]], FakeServer]


@pytest.fixture
def start() -> Iterator[Start]:
    """Servers that answer paths with JSON, bytes, or what a function makes of a request."""
    started: list[FakeServer] = []

    def answer(value: Any) -> Answer | Answering:
        if callable(value):
            return value
        return 200, {}, value if isinstance(value, bytes) else json.dumps(value).encode()

    def start_one(answers: dict[str, Any]) -> FakeServer:
        started.append(FakeServer({path: answer(value) for path, value in answers.items()}))
        return started[-1]

    yield start_one
    for server in started:
        server.close()


def run_config(model: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "teacher": {"model": str(model), "dtype": "float32"},
        "student": {"model": str(model), "dtype": "float32"},
        "data": {"train": "d", "max_prompt_tokens": 16},
        "rollout": {"max_new_tokens": 8},
    }
    return make_config({name: keys | sections.get(name, {}) for name, keys in values.items()})


def at(server: FakeServer, placement: str) -> dict[str, Any]:
    return {"placement": placement, "addresses": [server.address]}


@pytest.mark.parametrize(
    ("section", "table"),
    [(TeacherConfig, teacher_placements.PLACEMENTS), (RolloutConfig, sampler_placements.PLACEMENTS)],
)
def test_every_placement_of_the_config_has_its_class(section: type[TeacherConfig], table: dict[str, type]) -> None:
    assert set(get_args(section.model_fields["placement"].annotation)) == table.keys()


def test_a_served_teacher_is_asked_once(start: Start, tiny_student: Path) -> None:
    rows = read_config(str(tiny_student)).get_text_config().vocab_size
    head = head_to_bytes(OutputHead(torch.zeros(rows, HIDDEN)))
    served = {
        "protocol": teacher_protocol.PROTOCOL_VERSION, "model": "m",
        "fingerprint": model_fingerprint(tiny_student), "dtype": "float32",
        "hidden_size": HIDDEN, "vocabulary_rows": rows, "max_tokens": 64,
        "head_sha256": hashlib.sha256(head).hexdigest(),
    }  # fmt: skip

    def states(query: dict[str, str], body: bytes) -> Answer:
        rows = causal_states(read_ids(body), HIDDEN)[int(query["first_row"]) :]
        identity = teacher_protocol.ServedTeacherModel.model_validate(served).identity
        return (
            200,
            {"x-gkd-shape": f"{len(rows)},{HIDDEN}", "x-gkd-dtype": "float32", "x-gkd-identity": identity},
            (rows.tobytes()),
        )

    server = start({"/teacher": served, "/head": head, "/hidden_states": states})
    (teacher,) = ask_placements(run_config(tiny_student, teacher=at(server, "served"))).teachers.values()
    path = teacher.locate()
    assert teacher.scores_key(path) == f"{served['fingerprint']}-float32"
    (scores,) = whole(teacher.build(path, SITE).score([rollout(0, 3, 0)]))
    assert scores.head.weight.shape == (rows, HIDDEN)
    assert server.requests == ["/teacher", "/hidden_states", "/hidden_states", "/head"], "two are its probe"
    teacher.close()


def test_a_top_k_teacher_is_asked_once(start: Start, tiny_student: Path) -> None:
    position = {str(token): {"logprob": -2.0} for token in range(3)}
    answers = {
        "/v1/models": {"data": [{"id": "name"}]},
        "/v1/completions": {"choices": [{"prompt_logprobs": [None, position]}]},
    }
    server = start(answers)
    keys = {**at(server, "topk"), "top_k": 3}
    (teacher,) = ask_placements(run_config(tiny_student, teacher=keys)).teachers.values()
    with pytest.raises(ConfigError, match="has a token id"):  # this server takes any
        teacher.locate()
    assert teacher.scores_key(str(tiny_student)).startswith(f"{model_fingerprint(tiny_student)}-top3-")
    assert len(teacher.build(str(tiny_student), SITE).score([rollout(0, 3, 0)])) == 1
    assert server.requests.count("/v1/models") == 1
    teacher.close()


def test_a_served_sampler_is_asked_once(start: Start, tiny_student: Path) -> None:
    config = read_config(str(tiny_student))
    served = {
        "protocol": sampler_protocol.PROTOCOL_VERSION, "model": "m",
        "architecture": architecture_digest(config), "dtype": "float32",
        "vocabulary_rows": 20, "max_tokens": 176, "weight_transfer": "gloo", "weights_folder": None, "process": "p",
    }  # fmt: skip
    server = start({"/sampler": served})
    sampler = ask_placements(run_config(tiny_student, rollout=at(server, "served"))).sampler
    sampler.check_student(config)
    config.num_hidden_layers += 1
    with pytest.raises(ConfigError, match="has another architecture than the student"):
        sampler.check_student(config)
    site = sampler_placements.Site("cpu", is_main=False, from_main=lambda value: value, neighbours=lambda count: None)  # pyright: ignore
    sampler.build(SamplerSpec("vllm", "m", "float32", 176, pad_token_id=0), site)
    assert server.requests == ["/sampler"]
    sampler.close()


@pytest.mark.fault
def test_what_was_opened_is_closed_where_another_server_does_not_answer(
    start: Start, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = {str(token): {"logprob": -2.0} for token in range(20)}
    server = start(
        {
            "/v1/models": {"data": [{"id": "name"}]},
            "/v1/completions": {"choices": [{"prompt_logprobs": [None, position]}]},
        }
    )
    closed: list[str] = []
    monkeypatch.setattr(teacher_placements.Topk, "close", lambda teacher: closed.append(teacher.section))
    nobody = {"placement": "served", "addresses": ["http://127.0.0.1:9"]}
    with pytest.raises(ConfigError, match="no sampler answers"):
        ask_placements(run_config(tiny_student, teacher=at(server, "topk"), rollout=nobody))
    assert closed == ["teacher"]


def test_where_the_parts_are_is_known_without_torch() -> None:
    code = "import sys, gkd.train.placements; print({'torch', 'transformers', 'vllm'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
