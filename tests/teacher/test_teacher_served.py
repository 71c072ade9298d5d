"""Teachers served by real vLLM processes on loopback: exact, small on the wire, guarded, and replaceable."""

from __future__ import annotations

import itertools
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from launching import check, read_metrics, run_gkd
from other_tokenizers import byte_level
from scores import whole
from teacher_servers import TOKEN, Relay, rollout, start_server, total_rows, with_view
from tiny import save_tiny_model

import gkd
from gkd.config import TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.models import TokenBytes, TokenizerPair, load_causal_lm, load_tokenizer
from gkd.teacher.local import LocalTeacher
from gkd.teacher.replicas import Replicas
from gkd.teacher.served import ServedTeacher
from gkd.teacher.views import OtherTokenizer, WithViews
from gkd.types import AlignedScores, HiddenScores, Prompt, PromptDraw, Rollout

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CPU = torch.device("cpu")
PADDED_ROWS = 320  # of which the tokenizer uses 259
ROLLOUTS = [rollout(0, 5, 9), rollout(1, 2, 1), rollout(2, 11, 0), rollout(3, 1, 60), rollout(4, 200, 150)]


class Servers:
    """float32 with a tied head, twice, and bfloat16 with a head of its own and a padded vocabulary."""

    def __init__(self, folder: Path, exact_model: Path) -> None:
        self.folder, self.exact_model = folder, exact_model
        self.rounded_model = save_tiny_model(
            folder / "rounded", seed=4, layers=4, vocabulary=PADDED_ROWS, tied=False, scale=0.1
        )
        self.exact = start_server(exact_model, folder, "--dtype", "float32")
        self.doomed = start_server(exact_model, folder, "--dtype", "float32", "--max-model-tokens", "400")
        self.rounded = start_server(self.rounded_model, folder, "--dtype", "bfloat16")
        self.all = (self.exact, self.doomed, self.rounded)

    def config(self, *addresses: str, dtype: str = "float32", concurrency: int = 4) -> TeacherConfig:
        return TeacherConfig.model_validate(
            {"model": "teacher", "dtype": dtype, "placement": "served", "addresses": list(addresses),
             "token_file": str(self.folder / "token"), "max_concurrency": concurrency, "timeout_s": 60,
             "retry_s": 0}
        )  # fmt: skip

    def teacher(self, *addresses: str, dtype: str = "float32", concurrency: int = 4) -> ServedTeacher:
        return ServedTeacher(Replicas(self.config(*addresses, dtype=dtype, concurrency=concurrency)), device=CPU)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("served"), tiny_teacher)
    try:
        for server in started.all:
            server.wait_until_ready()
        yield started
        started.exact.process.send_signal(signal.SIGTERM)
        started.rounded.process.send_signal(signal.SIGINT)
        for server in (started.exact, started.rounded):
            assert server.process.wait(60) == 0, server.errors[-3000:]
            assert "Traceback" not in server.errors, server.errors[-3000:]
    finally:
        for server in started.all:
            server.process.kill()


def local_scores(model: Path, dtype: str, rollouts: list[Rollout]) -> list[HiddenScores]:
    loaded = load_causal_lm(str(model), dtype, key="teacher.model")
    return whole(LocalTeacher(loaded, device=CPU, micro_batch_size=2, pad_token_id=0).score(rollouts))


def divergences(scores: list[HiddenScores], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(per token [N], gradient of the mean in the student's states [N, H]) for one fixed random student."""
    teacher_hidden = torch.cat([one.states for one in scores])
    generator = torch.Generator().manual_seed(0)
    student_hidden = torch.randn(len(teacher_hidden), 48, generator=generator).requires_grad_()
    student_head = torch.randn(280, 48, generator=generator) * 0.3
    divergence = gkd.linear_divergence(
        student_hidden, student_head, teacher_hidden, scores[0].head.weight, kind, reduction="none", valid_vocab=259
    )
    divergence.mean().backward()
    assert student_hidden.grad is not None
    return divergence.detach(), student_hidden.grad


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_float32_is_the_local_teacher(servers: Servers, kind: str) -> None:
    served = whole(servers.teacher(servers.exact.address).score(ROLLOUTS))
    local = local_scores(servers.exact_model, "float32", ROLLOUTS)
    assert [one.states.shape for one in served] == [one.states.shape for one in local]
    assert len(served[2]) == 0 and torch.equal(served[0].head.weight, local[0].head.weight)
    (value, gradient), (local_value, local_gradient) = divergences(served, kind), divergences(local, kind)
    assert local_value.mean() > 0.1, "far from a trivial comparison"
    torch.testing.assert_close(value, local_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, local_gradient, atol=1e-7, rtol=1e-4)


def test_it_reads_its_own_view(servers: Servers) -> None:
    view = rollout(7, 90, 0).draw.prompt.token_ids
    seen = [with_view(one, view[: 3 + 20 * i]) for i, one in enumerate(ROLLOUTS)]
    by_hand = [
        Rollout(PromptDraw(Prompt(0, view[: 3 + 20 * i], ""), 0), "student", one.completion_ids)
        for i, one in enumerate(ROLLOUTS)
    ]
    served = whole(WithViews(servers.teacher(servers.exact.address)).score(seen))
    plain = local_scores(servers.exact_model, "float32", ROLLOUTS)
    for found, expected, other in zip(
        served, local_scores(servers.exact_model, "float32", by_hand), plain, strict=True
    ):
        torch.testing.assert_close(found.states, expected.states, atol=1e-4, rtol=1e-4)
        assert not len(found) or (found.states - other.states).abs().max() > 0.1


def test_bfloat16_is_the_local_teacher_up_to_rounding(servers: Servers) -> None:
    served = whole(servers.teacher(servers.rounded.address, dtype="bfloat16").score(ROLLOUTS))
    local = local_scores(servers.rounded_model, "bfloat16", ROLLOUTS)
    head = served[0].head
    assert all(one.states.dtype == torch.bfloat16 for one in served)
    assert head.weight.shape == (PADDED_ROWS, 64) and torch.equal(head.weight, local[0].head.weight)
    (value, gradient), (local_value, local_gradient) = divergences(served, "jsd"), divergences(local, "jsd")
    print(
        "bf16",
        (value - local_value).abs().max(),
        (value - local_value).abs().mean(),
        local_value.mean(),
        (gradient - local_gradient).norm() / local_gradient.norm(),
    )
    torch.testing.assert_close(value, local_value, atol=1e-3, rtol=1e-3)
    assert (gradient - local_gradient).norm() < 1e-2 * local_gradient.norm()


def test_a_scored_token_costs_its_hidden_state_on_the_wire(servers: Servers) -> None:
    """2 H bytes down and 4 a token up, and what HTTP's headers take."""
    long = [rollout(i, 8, 500) for i in range(12)]
    relay = Relay(servers.rounded.address)
    try:
        teacher = servers.teacher(relay.address, dtype="bfloat16")
        down, up = relay.answered_bytes, relay.sent_bytes
        teacher.score(long)
        down, up = relay.answered_bytes - down, relay.sent_bytes - up
    finally:
        relay.close()
    states_bytes, ids_bytes = 2 * 64 * total_rows(long), 4 * sum(len(one.token_ids) - 1 for one in long)
    assert states_bytes <= down <= states_bytes * 1.01 + 400 * len(long), down / total_rows(long)
    assert ids_bytes <= up <= ids_bytes + 400 * len(long)


def test_two_servers_share_the_work_and_one_finishes_it_when_the_other_is_killed(servers: Servers) -> None:
    many = [rollout(i, 20 + i % 7, 40 + i) for i in range(24)]
    expected = local_scores(servers.exact_model, "float32", many)
    relays = [Relay(server.address) for server in (servers.exact, servers.doomed)]
    teacher = servers.teacher(*(relay.address for relay in relays), concurrency=2)

    def answered() -> list[int]:
        return [relay.answered_bytes for relay in relays]

    def scored_right() -> list[int]:
        """What each server answered meanwhile."""
        before = answered()
        for found, wanted in zip(whole(teacher.score(many)), expected, strict=True):
            torch.testing.assert_close(found.states, wanted.states, atol=1e-4, rtol=1e-4)
        return [now - start for now, start in zip(answered(), before, strict=True)]

    try:
        shares = scored_right()
        assert min(shares) > 0.25 * sum(shares) and sum(shares) >= 4 * 64 * total_rows(many), shares
        limit = relays[1].answered_bytes + shares[1] // 4

        def kill_in_the_middle() -> None:
            if relays[1].answered_bytes > limit:
                servers.doomed.process.kill()

        relays[1].on_answer = kill_in_the_middle
        shares = scored_right()
        assert servers.doomed.process.wait(10) == -signal.SIGKILL
        assert 0 < shares[1] < shares[0], shares
        relays[0].close()
        shares = scored_right()
        assert shares[1] == 0, "a server that failed is left alone for a while"
    finally:
        for relay in relays:
            relay.close()


def test_without_any_server_left_the_error_names_the_address(servers: Servers) -> None:
    relay = Relay(servers.exact.address)
    teacher = servers.teacher(relay.address)
    relay.cut()
    with pytest.raises(
        TeacherError, match=rf"prompt \d sample 0 \(student\).*{relay.address}: .*; then {relay.address}"
    ):
        teacher.score(ROLLOUTS)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", f"Bearer {TOKEN}x", TOKEN, "Bearer wrong"])
def test_without_the_token_every_route_is_closed(servers: Servers, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    paths = ("/teacher", "/head", "/hidden_states", "/", "/docs", "/openapi.json", "/metrics")
    with httpx.Client(base_url=servers.exact.address, headers=headers, trust_env=False) as client:
        for method, path in itertools.product(("GET", "POST", "PUT", "OPTIONS"), paths):
            answer = client.request(method, path)
            assert answer.status_code == 401 and "token" in answer.json()["error"], (method, path)
            assert "x-gkd-identity" not in answer.headers


def post(servers: Servers, body: bytes, query: str = "?first_row=0") -> httpx.Response:
    headers = {"authorization": f"Bearer {TOKEN}"}
    return httpx.post(f"{servers.exact.address}/hidden_states{query}", content=body, headers=headers, trust_env=False)


@pytest.mark.fault
def test_malformed_requests_get_an_answer_and_the_server_lives(servers: Servers) -> None:
    ids = b"".join(i.to_bytes(4, "little") for i in range(3, 10))
    for body, query, status, words in (
        (b"", "", 400, "no token ids"),
        (ids[:-1], "", 400, "no token ids"),
        (b"\xff" * 8, "", 400, "no token id -1"),
        ((300).to_bytes(4, "little"), "", 400, "no token id 300"),
        (ids, "?first_row=7", 400, "no row"),
        (ids, "?first_row=-1", 400, "no row"),
        (ids, "?first_row=1e3", 400, "no row"),
        (ids, "?first_row=" + "9" * 4000, 400, "no row"),
        (ids * 100, "", 413, "at most 512 tokens"),
        (bytes(4 << 20), "", 413, "at most 512 tokens"),
    ):
        answer = post(servers, body, query)
        assert answer.status_code == status and words in answer.json()["error"], (query[:30], answer.text)
    address = httpx.URL(servers.exact.address)
    for garbage in (
        b"\0\1\2\r\n\r\n",
        b"POST /hidden_states HTTP/1.1\r\ncontent-length: 99\r\n\r\nshort",
        b"G" * 200_000,
    ):
        with socket.create_connection((address.host, address.port or 0)) as raw, suppress(OSError):
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(1000)
    answer = post(servers, ids, "?first_row=6")
    assert answer.status_code == 200 and answer.headers["x-gkd-shape"] == "1,64" and len(answer.content) == 4 * 64


def test_many_long_requests_at_once(servers: Servers) -> None:
    """More than the engine takes in one forward: it cuts them in chunks, and every row arrives."""
    many = [rollout(i, 1, 511) for i in range(20)]
    served = whole(servers.teacher(servers.exact.address, concurrency=20).score(many))
    local = local_scores(servers.exact_model, "float32", many[:2])
    for one, other in zip(served, local, strict=False):
        torch.testing.assert_close(one.states, other.states, atol=1e-4, rtol=1e-4)
    assert all(one.states.shape == (511, 64) for one in served)


def test_servers_of_different_models_are_refused(servers: Servers) -> None:
    other = servers.rounded.address
    with pytest.raises(ConfigError, match=f"teacher.dtype: float32, but {other} serves bfloat16"):
        Replicas(servers.config(servers.exact.address, other))


def run_config(servers: Servers, folder: Path, name: str, student: Path, **sections: dict[str, object]) -> Path:
    """A config of two steps with the exact server's teacher; `sections` are merged in."""
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"prompt {i} " + "x" * i, "completion": "y" * (1 + i)}) + "\n" for i in range(8))
    )
    values: dict[str, dict[str, object]] = {
        "run": {"name": name, "dir": str(folder / name), "steps": 2, "seed": 5},
        "teacher": {"model": str(servers.exact_model), "dtype": "float32", "placement": "served",
                    "addresses": [servers.exact.address], "token_file": str(servers.folder / "token")},
        "student": {"model": str(student), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 12},
        "mixture": {"student": 0.7, "dataset": 0.3},
        "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 4},
    }  # fmt: skip
    for section, keys in sections.items():
        values[section] = {key: value for key, value in (values[section] | keys).items() if value != "left out"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_run_with_a_served_teacher_is_the_run_with_the_local_one(
    servers: Servers, tiny_student: Path, tmp_path: Path
) -> None:
    local_teacher = {"placement": "local", "addresses": "left out", "token_file": "left out"}

    def train(name: str, teacher: dict[str, object]) -> list[dict[str, float]]:
        check(run_gkd(["train", run_config(servers, tmp_path, name, tiny_student, teacher=teacher)]))
        return read_metrics(tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        served, local = pool.map(train, ("served", "local"), ({}, local_teacher))
    assert len(served) == len(local) == 2 and local[0]["loss"] != local[1]["loss"]
    for one, other in zip(served, local, strict=True):
        for metric in ("loss", "divergence/forward_kl", "entropy/teacher", "grad_norm"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-5), metric


def test_what_does_not_fit_is_said_before_anything_is_loaded(
    servers: Servers, tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GKD_SERVER_TOKEN", raising=False)

    def check_run(**sections: dict[str, object]) -> None:
        gkd.Distiller(run_config(servers, tmp_path, "refused", tiny_student, **sections)).check()

    def refusal(**sections: dict[str, object]) -> str:
        with pytest.raises(ConfigError) as caught:
            check_run(**sections)
        return str(caught.value)

    check_run(data={"max_prompt_tokens": 501})  # 513 tokens, of which 512 are read
    text = refusal(data={"max_prompt_tokens": 502})
    assert text.startswith("teacher.addresses: a sequence can reach 514") and "--max-model-tokens 513" in text
    assert refusal(teacher={"token_file": None}).startswith("teacher.token_file: ")
    nobody = "http://127.0.0.1:9"
    text = refusal(teacher={"addresses": [servers.exact.address, nobody]})
    assert text.startswith(f"teacher.addresses: no teacher answers at {nobody}") and "gkd serve-teacher" in text
    monkeypatch.setenv("GKD_SERVER_TOKEN", TOKEN)
    check_run(teacher={"token_file": None})


def test_another_model_than_teacher_model_is_refused(servers: Servers, tmp_path: Path, tiny_student: Path) -> None:
    config = run_config(servers, tmp_path, "other", tiny_student, teacher={"model": str(tiny_student)})
    result = run_gkd(["train", config])
    *notes, error = result.stderr.splitlines()
    assert result.returncode == 2 and all("by auto" in note for note in notes), result.stderr
    assert "teacher.addresses: " in error and "is not teacher.model" in error


def test_another_tokenizer_is_served_as_it_is_local(servers: Servers) -> None:
    """The student's tokens are others: what goes to the server is the teacher's reading of their bytes."""
    own = TokenBytes(byte_level(), "student.model")
    theirs = TokenBytes(load_tokenizer(str(servers.exact_model)), "teacher.model")
    pair = TokenizerPair.of(own, theirs, (own.tokenizer.eos_token_id,), (theirs.tokenizer.eos_token_id,))  # pyright: ignore
    other = OtherTokenizer(pair, pair.alignment, 30)
    texts = ("the cat sat on the mat", "", "你好 🤖", "the quick brown fox jumps over the lazy dog and the mat")
    rollouts = []
    for one, text in zip(ROLLOUTS, texts, strict=False):
        ids = (*own.encode(text.encode()), *([own.tokenizer.eos_token_id] if text else []))
        rollouts.append(replace(with_view(one, one.draw.prompt.token_ids), completion_ids=ids))  # pyright: ignore
    loaded = load_causal_lm(str(servers.exact_model), "float32", key="teacher.model")
    local = LocalTeacher(loaded, device=CPU, micro_batch_size=2, pad_token_id=0)
    both = [
        WithViews(teacher, {"main": other}).score(rollouts)
        for teacher in (servers.teacher(servers.exact.address), local)
    ]
    for served, here, one in zip(*both, rollouts, strict=True):
        assert isinstance(served, AlignedScores) and isinstance(here, AlignedScores)
        assert len(served) == len(here) == len(one.completion_ids)
        torch.testing.assert_close(served.states, here.states, atol=1e-5, rtol=1e-5)
        assert served.labels.tolist() == here.labels.tolist()
        assert served.student_spans.tolist() == here.student_spans.tolist()
    assert len(both[0][3].labels) <= 30 and -1 in both[0][3].student_spans.tolist(), "a text that is too long is cut"
