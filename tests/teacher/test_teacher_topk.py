"""A top-k teacher behind vLLM's own server: what it tells is the truth, and a run with it says what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from launching import check, read_metrics, run_gkd
from scores import topk, whole
from teacher_servers import (
    TOKEN,
    Relay,
    TeacherServer,
    kill_openai_server,
    rollout,
    start_openai_server,
    wait_until_healthy,
    with_view,
)
from tiny import save_tiny_model

from gkd.config import TeacherConfig
from gkd.errors import ConfigError
from gkd.models import head_logits, load_causal_lm
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.local import LocalTeacher
from gkd.teacher.topk import TopkTeacher
from gkd.teacher.views import WithViews
from gkd.types import Prompt, PromptDraw, Rollout, TeacherScores

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
CPU = torch.device("cpu")
ROWS = 320  # of which the tokenizer uses 259
ROLLOUTS = [rollout(0, 5, 9), rollout(1, 2, 1), rollout(2, 11, 0), rollout(3, 1, 60), rollout(4, 150, 100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("topk")
    (path / "token").write_text(TOKEN)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_tiny_model(folder / "teacher", seed=1, layers=4, vocabulary=ROWS, scale=0.2)


@pytest.fixture(scope="module")
def server(folder: Path, model: Path) -> Iterator[TeacherServer]:
    started = start_openai_server(model, folder, "--max-logprobs", "30", "--max-model-len", "300")
    try:
        yield wait_until_healthy(started)
    finally:
        kill_openai_server(started)


def config(folder: Path, address: str, **keys: object) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": str(folder / "teacher"), "placement": "topk", "addresses": [address], "top_k": 7,
         "token_file": str(folder / "token"), "max_concurrency": 4, "timeout_s": 60, "retry_s": 0, **keys}
    )  # fmt: skip


def teacher(folder: Path, address: str) -> TopkTeacher:
    return TopkTeacher(Endpoints(config(folder, address)), top_k=7, vocabulary_rows=ROWS, device=CPU)


def test_it_is_the_local_teachers_top_k(folder: Path, model: Path, server: TeacherServer) -> None:
    relay = Relay(server.address)
    found = topk(teacher(folder, relay.address).score(ROLLOUTS))
    local = LocalTeacher(load_causal_lm(str(model), "float32"), device=CPU, micro_batch_size=2, pad_token_id=0)
    for one, scores, hidden in zip(ROLLOUTS, found, whole(local.score(ROLLOUTS)), strict=True):
        assert scores.ids.shape == scores.log_probs.shape == (len(one.completion_ids), 7)
        log_probs = head_logits(hidden.states, hidden.head).log_softmax(-1)
        expected = log_probs.topk(7, dim=-1)
        torch.testing.assert_close(scores.log_probs, expected.values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_probs.gather(-1, scores.ids), expected.values, atol=1e-4, rtol=1e-4)
    tokens = sum(len(one.token_ids) for one in ROLLOUTS if one.completion_ids)
    assert relay.answered_bytes < 100 * 7 * tokens + 2000 * len(ROLLOUTS)  # JSON; of the prompt's tokens too


def test_it_reads_its_own_view(folder: Path, model: Path, server: TeacherServer) -> None:
    view = rollout(7, 40, 0).draw.prompt.token_ids
    seen = [with_view(one, view[: 1 + 9 * i]) for i, one in enumerate(ROLLOUTS)]
    found = topk(WithViews(teacher(folder, server.address)).score(seen))
    local = LocalTeacher(load_causal_lm(str(model), "float32"), device=CPU, micro_batch_size=2, pad_token_id=0)
    for i, (one, scores) in enumerate(zip(ROLLOUTS, found, strict=True)):
        by_hand = Rollout(PromptDraw(Prompt(0, view[: 1 + 9 * i], ""), 0), "student", one.completion_ids)
        (hidden,) = whole(local.score([by_hand]))
        expected = head_logits(hidden.states, hidden.head).log_softmax(-1).topk(7, dim=-1).values
        torch.testing.assert_close(scores.log_probs, expected, atol=1e-4, rtol=1e-4)


def test_what_a_server_does_not_offer(folder: Path, server: TeacherServer) -> None:
    def refusal(**keys: object) -> str:
        with pytest.raises(ConfigError) as error:
            Endpoints(config(folder, server.address, **keys))
        return str(error.value)

    text = refusal(top_k=31)
    assert text.startswith(f"teacher.top_k: {server.address} does not tell the 31 most likely tokens (status 400: ")
    assert text.endswith("start the server with --max-logprobs 31") and "max allowed: 30" in text
    assert refusal(token_file=None).startswith("teacher.token_file: ")
    endpoints = Endpoints(config(folder, server.address))
    endpoints.check_vocabulary(ROWS)
    with pytest.raises(ConfigError, match=r"which has a token id 259, but teacher\.model has 259 ids"):
        endpoints.check_vocabulary(259)
    with pytest.raises(ConfigError, match=r"which has no token id 320, but teacher\.model has 321 ids"):
        endpoints.check_vocabulary(ROWS + 1)


def test_kept_scores_are_those_of_the_server(folder: Path, server: TeacherServer, tmp_path: Path) -> None:
    texts = [Rollout(one.draw, "dataset", one.completion_ids) for one in ROLLOUTS]

    def scored(address: str) -> list[TeacherScores]:
        relay = Relay(address)
        found = CachedTeacher(lambda: teacher(folder, relay.address), tmp_path, limit_bytes=1 << 20, device=CPU).score(
            texts
        )
        assert bool(relay.answered_bytes) == (address == server.address)
        return found

    for one, other in zip(topk(scored(server.address)), topk(scored("http://127.0.0.1:9")), strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.log_probs, other.log_probs)


def test_a_run(folder: Path, model: Path, server: TeacherServer) -> None:
    student = save_tiny_model(folder / "student", seed=2, vocabulary=ROWS)
    rows = [{"prompt": [{"role": "user", "content": f"Say {word}."}]} for word in ("one", "two", "three", "four")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"dir": str(folder / "run"), "steps": 2},
        "teacher": {"model": str(model), "dtype": "float32", "placement": "topk", "addresses": [server.address],
                    "token_file": str(folder / "token"), "cache_gib": 0.1},
        "student": {"model": str(student), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "heldout": str(folder / "rows.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 8},
        "objective": {"kind": "jsd"},
        "optim": {"batch_size": 4, "micro_batch_size": 2},
        "eval": {"prompts": 4, "samples": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    check(run_gkd(["train", folder / "run.yaml"], GKD_CACHE=str(folder / "cache")))
    assert list((folder / "cache" / "scores").glob("*-top20-*/*"))
    records = read_metrics(folder / "run")
    assert len(records) == 2
    for record in records:
        assert record["divergence/topk_forward_kl"] > 0 and record["divergence/topk_reverse_kl"] > 0
        assert not {"divergence/forward_kl", "divergence/reverse_kl", "entropy/teacher"} & record.keys()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["heldout_topk_jsd_after"] > 0 and "heldout_jsd_after" not in summary
    shown = json.loads((folder / "run" / "samples" / "tokens_after.json").read_text())["answers"][0]["tokens"][0]
    assert shown["forward_kl"] is None and len(shown["alternatives"]) == 5

    text = run_gkd(["train", folder / "run.yaml", "rollout.max_new_tokens=240", "--overwrite"]).stderr
    assert "start it with --max-model-len 305 or more" in text
