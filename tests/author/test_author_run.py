"""Whole runs: killed and continued, in order whatever is fast, held against held-out texts, and what is beside them."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from author_runs import Bench, Server, chat, dropped, question_of
from author_server import author_server, requests_in
from launching import check, environment, run_gkd

from gkd.author import progress
from gkd.author.authors.kept import AnswerStore, Spent
from gkd.author.progress import Progress
from gkd.author.questions import Answer, AskSettings, Question, answer_key, question_digest
from gkd.author.records import Drop, Tally
from gkd.errors import InputError, MachineError

STEPS = {"ask": {"prompt": "{{ question }}"}}, {"write": {"prompt": "{{ question }}"}}


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i}", "answer": str(i)} for i in range(count)]


def start(folder: Path, recipe: Path, data: Path, out: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gkd", "author", recipe, *words, "--data", data, "--out", folder / out]
    return subprocess.Popen(
        [str(word) for word in command], env=environment(GKD_CACHE=str(folder / "cache")), stderr=subprocess.PIPE
    )


def wait_until(done: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if done():
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError("nothing came")


def sums(folder: Path, address: str) -> tuple[Path, Path]:
    """A recipe with samples, a filter and a memory, and its problems."""
    recipe = folder / "recipe.yaml"
    teacher = {"address": address, "model": "stub", "max_concurrency": 4, "retry_s": 60.0}
    steps = [
        {"ask": {"prompt": "What is {{ a }} + {{ b }}?", "samples": 3}},
        {"read": {"regex": r"(?s)^(?P<why>.+)\nAnswer: (?P<said>\d+)$"}},
        {"keep": {"close": {"value": "said", "to": "a + b"}, "reason": "wrong"}},
        {"distinct": {"of": "why", "among": "all"}},
        {"write": {"prompt": "{{ a }} + {{ b }}", "completion": "{{ why }} {{ said }}"}},
    ]
    recipe.write_text(yaml.safe_dump({"models": {"teacher": teacher}, "steps": steps}))
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps({"a": i % 20, "b": i % 7}) + "\n" for i in range(120)))
    return recipe, data


@pytest.mark.slow
def test_run_and_server_are_killed_on_the_way_and_the_file_is_the_same(tmp_path: Path) -> None:
    log, other_log = tmp_path / "asked", tmp_path / "asked_once"
    with author_server(other_log) as (address, _):
        recipe, data = sums(tmp_path, address)
        whole = check(run_gkd(["author", recipe, "--data", data, "--out", tmp_path / "whole.jsonl"],
                              GKD_CACHE=str(tmp_path / "other_cache")))  # fmt: skip
    assert "whole.jsonl: " in whole.stdout
    with author_server(log, delay_s=0.02) as (address, server):
        words = [f"models.teacher.address={address}"]
        first = start(tmp_path, recipe, data, "out.jsonl", *words)
        wait_until(lambda: len(requests_in(log)) > 60, first)
        first.kill()
        first.wait()
        asked = len(requests_in(log))
        assert 60 < asked < 300 and not (tmp_path / "out.jsonl").exists()
        second = start(tmp_path, recipe, data, "out.jsonl", *words)
        wait_until(lambda: len(requests_in(log)) > asked + 40, second)
        server.kill()
        server.wait()
        time.sleep(1.0)
        assert second.poll() is None, "it waits for the server"
        with author_server(log, port=int(address.rpartition(":")[2])):
            assert second.wait(timeout=120) == 0, second.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) > 50
    again = requests_in(log)
    assert set(again) == set(requests_in(other_log))
    assert len(again) - len(set(again)) <= 2 * 4, "but for what was on its way when somebody was killed"
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.slow
def test_a_signal_waits_for_what_is_on_its_way_and_the_same_command_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    with author_server(log, delay_s=0.05) as (address, _):
        recipe, data = sums(tmp_path, address)
        first = start(tmp_path, recipe, data, "out.jsonl")
        wait_until(lambda: len(requests_in(log)) > 20, first)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
        assert first.returncode == 75 and b"SIGTERM; every answer is kept, and the same command goes on" in said
        asked = requests_in(log)
        check(
            run_gkd(
                ["author", recipe, "--data", data, "--out", tmp_path / "out.jsonl"], GKD_CACHE=str(tmp_path / "cache")
            )
        )
        more = requests_in(log)[len(asked) :]
        assert more and not set(asked) & set(more), "nothing is asked twice"


LOCAL = [
    {"ask": {"prompt": "{{ question }}", "samples": 2, "max_new_tokens": 12, "truncated": "keep", "logprobs": True}},
    {"ask": {"text": "{{ text }} -", "into": "more", "max_new_tokens": 6, "truncated": "keep", "stop": ["e"]}},
    {"write": {"prompt": "{{ question }}", "completion": "{{ (text ~ more)|json }} {{ text_logprob }}"}},
]


def local_recipe(folder: Path, model: Path, engine: str = "transformers") -> tuple[Path, Path]:
    teacher = {"model": str(model), "engine": engine, "dtype": "float32", "max_model_tokens": 256}
    recipe, data = folder / "recipe.yaml", folder / "data.jsonl"
    recipe.write_text(yaml.safe_dump({"models": {"teacher": teacher}, "steps": LOCAL, "block_rows": 8}))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(64)))
    return recipe, data


def answers_in(folder: Path) -> int:
    path = folder / "cache" / "author" / "answers.sqlite"
    if not path.exists():
        return 0
    store = AnswerStore(path)
    (count,) = store._database.execute("SELECT COUNT(*) FROM answers").fetchone()
    store.close()
    return count


@pytest.mark.slow
def test_with_transformers_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, tiny_teacher: Path) -> None:
    recipe, data = local_recipe(tmp_path, tiny_teacher)
    check(
        run_gkd(
            ["author", recipe, "--data", data, "--out", tmp_path / "whole.jsonl"], GKD_CACHE=str(tmp_path / "other")
        )
    )
    first = start(tmp_path, recipe, data, "out.jsonl")
    wait_until(lambda: answers_in(tmp_path) >= 32, first)
    first.kill()
    first.wait()
    kept = answers_in(tmp_path)
    assert 32 <= kept < 256 and kept % 16 == 0, "a block's answers are kept together"
    second = check(
        run_gkd(["author", recipe, "--data", data, "--out", tmp_path / "out.jsonl"], GKD_CACHE=str(tmp_path / "cache"))
    )
    assert f"{256 - kept} asked, {kept} kept from before" in second.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_a_template_leaves_out_is_a_counted_row(tmp_path: Path, tiny_teacher: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ tone }}"
    file = folder / "tokenizer_config.json"
    (folder / "chat_template.jinja").write_text(template)
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    bench = Bench(tmp_path)
    ask = {
        "messages": [{"role": "system", "content": "{{ answer }}"}, {"content": "{{ question }}"}],
        "max_new_tokens": 4,
    }
    here = {"engine": "transformers", "dtype": "float32", "address": None, "model": str(folder)}
    keys = {"chat_template_kwargs": {"tone": "!"}, "max_model_tokens": 64}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"models": {"teacher": {**here, **keys}}, "steps": [{"ask": ask}, STEPS[1]]}))
    run, made = bench.run(recipe, bench.data(*rows(2)), question_of)
    assert made == [] and dropped(run) == {"the chat template leaves messages out": 2}
    recipe.write_text(recipe.read_text().replace("tone", "tune"))
    with pytest.raises(InputError, match=r"models\.teacher\.chat_template_kwargs: .* does not know 'tune'"):
        bench.run(recipe, bench.data(*rows(2)), question_of, out="other.jsonl")


@pytest.mark.vllm
@pytest.mark.slow
def test_with_vllm_nothing_is_asked_twice(tmp_path: Path, tiny_teacher: Path) -> None:
    recipe, data = local_recipe(tmp_path, tiny_teacher, "vllm")
    first = start(tmp_path, recipe, data, "out.jsonl")
    wait_until(lambda: answers_in(tmp_path) >= 32, first)
    first.kill()
    first.wait()
    kept = answers_in(tmp_path)
    second = check(
        run_gkd(["author", recipe, "--data", data, "--out", tmp_path / "out.jsonl"], GKD_CACHE=str(tmp_path / "cache"))
    )
    assert kept < 256 and f"{256 - kept} asked, {kept} kept from before" in second.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) > 100


def test_rows_come_in_order_whatever_is_fast(bench: Bench) -> None:
    class FirstIsSlow(Server):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            is_first = request.method == "POST" and int(question_of(json.loads(await request.aread())).split()[-1]) < 16
            await asyncio.sleep(0.05 if is_first else 0.0)
            return await super().handle_async_request(request)

    steps = STEPS[0], {"distinct": {"among": "all", "of": "answer|int % 20"}}, STEPS[1]
    data = bench.data(*rows(200))
    _, first = bench.run(bench.recipe(*steps, teacher={"max_concurrency": 64}), data, FirstIsSlow(question_of))
    assert [row["prompt"][0]["content"] for row in first] == [f"what is {i}" for i in range(20)]


def test_equal_questions_are_asked_once(bench: Bench) -> None:
    data, server = bench.data(*rows(3), *rows(40), *rows(3)), Server(question_of)
    _, made = bench.run(bench.recipe(*STEPS), data, server)
    assert len(made) == 46 and len(server.asked) == 40


CHANGES = {"max_new_tokens": 2, "top_p": 0.5, "temperature": 0.5, "stop": ("x",), "logprobs": True}


def test_everything_in_a_question_is_in_its_digest_and_its_author_in_the_key() -> None:
    def settings(**changes: Any) -> AskSettings:
        values = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "stop": (), "logprobs": False}
        return AskSettings(**{**values, **changes})

    message = ({"role": "user", "content": "a"},)
    questions = [
        Question("a", settings(), 0), Question(message, settings(), 0), Question("b", settings(), 0),
        Question("a", settings(), 1), *(Question("a", settings(**{name: value}), 0) for name, value in CHANGES.items()),
    ]  # fmt: skip
    digests = {question_digest(question) for question in questions}
    keys = {answer_key(digest, name, seed) for name in ("m", "n") for seed in (0, 1) for digest in digests}
    assert len(digests) == len(questions) and len(keys) == 4 * len(questions)


def test_a_step_that_changes_asks_nothing_again(bench: Bench) -> None:
    data, server = bench.data(*rows(10)), Server(question_of)
    bench.run(bench.recipe(*STEPS), data, server)
    changed = STEPS[0], {"keep": {"where": "answer|int < 5"}}, STEPS[1]
    assert len(bench.run(bench.recipe(*changed), data, server, out="other.jsonl")[1]) == 5
    assert len(server.asked) == 10


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(MachineError, match=r"answers\.sqlite: file is not a database; .* remove it, or set GKD_CACHE"):
        AnswerStore(path)


def test_the_store_keeps_what_was_first(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "a.sqlite")
    first, second = Answer("a", "stop", 1, 2, -0.5), Answer("b", "length", 3, 4)
    store.add([(b"1", first), (b"2", second)])
    store.add([(b"1", second)])
    assert store.find([b"1", b"2", b"3"]) == {b"1": first, b"2": second}
    assert len(store.find([str(i).encode() for i in range(2000)])) == 2, "more keys than SQLite takes at once"


def test_a_row_that_shares_words_with_held_out_texts_is_left_out(bench: Bench) -> None:
    long = " ".join(f"w{i}" for i in range(20))
    heldout = bench.data(
        {"text": f"before {long} after"}, {"messages": [{"role": "user", "content": "What is 2"}]}, name="held.jsonl"
    )
    data = bench.data(*rows(3), {"question": "long"}, {"question": "longer"})
    said = {"long": long, "longer": " ".join(long.split()[:12])}
    recipe = bench.recipe(*STEPS)
    run, made = bench.run(recipe, data, lambda body: said.get(question_of(body), "so"), heldout=str(heldout))
    assert [row["prompt"][0]["content"] for row in made] == ["what is 0", "what is 1", "longer"]
    assert dropped(run) == {"shares 13 words in a row, or a whole text, with --heldout": 2}
    assert "held.jsonl` (XXH3 " in (bench.folder / "out.card.md").read_text()


def test_card_and_page(bench: Bench) -> None:
    recipe = bench.recipe(*STEPS, license="cc0-1.0", name="try", teacher={"prices": {"prompt": 1e6, "completion": 0.0}})
    attack = "<script>alert(1)</script>\x1b[2J"
    said = {0: chat("cut | off", "length"), 1: chat(attack), 2: chat("fine")}
    bench.run(recipe, bench.data(*rows(3)), lambda body: said[int(question_of(body)[-1])])
    card = (bench.folder / "out.card.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {"license": "cc0-1.0", "tags": ["gkd", "distillation", "synthetic"], "size_rows": 2}
    assert (
        "3 rows were read and 2 written; 1 rows brought none." in body
        and "Tokens: 30 read, 15 written, cost 30." in body
    )
    assert "| steps.0.ask | 3 | 2 |" in body and "| steps.0.ask | cut off at max_new_tokens = 512 | 1 |" in body
    assert "`stub` at http://127.0.0.1:9, by chat" in body
    assert yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0]) == yaml.safe_load(recipe.read_text())
    page = (bench.folder / "out.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "\x1b" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "cut off at max_new_tokens = 512" in page and "cut | off" in page


def test_no_rows_at_all_are_a_result_too(bench: Bench) -> None:
    run, made = bench.run(
        bench.recipe(STEPS[0], {"keep": {"where": "false"}}, STEPS[1]), bench.data(*rows(3)), question_of
    )
    assert made == [] and run.made.tally.rows_without == 3
    assert "No row was written" in (bench.folder / "out.html").read_text()


def test_progress_says_what_was_dropped_and_how_long_it_takes() -> None:
    tally, stream = Tally(["steps.0.ask"]), StringIO()
    for reason in ("a", "a", "b", "c", "d"):
        tally.drop(0, Drop(reason), "x:1", {})
    tally.rows, tally.written = 25, 20
    spent = Spent(asked=30, found=4, prompt_tokens=9000, completion_tokens=3300, money=0.25)
    line = Progress(100, stream).line(tally, spent, 2.0)
    assert line == (
        "25/100 rows, 20 written, 30 asked, 4 kept from before, 5 dropped (a 2, b 1, c 1, ...), 12.3k tokens, "
        "cost 0.25, 2m30s left"
    )


def test_the_time_that_is_left_is_that_of_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tally, spent, stream = Tally([]), Spent(), StringIO()
    one = Progress(100, stream)
    for now[0], tally.rows, spent.asked in ((1.0, 40, 0), (31.0, 50, 8), (91.0, 60, 16)):
        one.tell(tally, spent)
    assert [line.rpartition(", ")[2] for line in stream.getvalue().splitlines()] == ["0.0 tokens", "4m00s left"]


def test_dry_run_asks_nothing(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    with author_server(log) as (address, _):
        recipe, data = sums(tmp_path, address)
        done = check(run_gkd(["author", recipe, "--data", data, "--dry-run"], GKD_CACHE=str(tmp_path / "cache")))
    assert "first question of 120 rows" in done.stdout and "What is 0 + 0?" in done.stdout
    assert requests_in(log) == []


def test_a_server_that_is_down_is_one_line(tmp_path: Path) -> None:
    recipe, data = sums(tmp_path, "http://127.0.0.1:9")
    done = run_gkd(["author", recipe, "--data", data, "--out", tmp_path / "o.jsonl"], GKD_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "models.teacher.address: http://127.0.0.1:9/v1 does not answer" in done.stderr
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["author"] and not (tmp_path / "o.jsonl").exists()
