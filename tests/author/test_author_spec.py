"""What is wrong in a recipe or its input is said in one line, before anything is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from author_runs import Bench, Server, question_of

from gkd.author import AuthorRun, Recipe
from gkd.errors import InputError

ASK, WRITE = {"ask": {"prompt": "{{ question }}"}}, {"write": {"prompt": "{{ question }}"}}


@pytest.mark.parametrize(
    ("steps", "others", "message"),
    [
        ([ASK], {}, "steps: none of them writes"),
        ([ASK, {"wriet": {}}], {}, r"steps\.1\.wriet: unknown key"),
        ([{"ask": {}, "write": {}}], {}, r"steps\.0: expected one of ask, read, keep, distinct, sample, write, not 2"),
        (
            [{"ask": {"prompt": "a", "text": "b"}}, WRITE],
            {},
            r"steps\.0\.ask: expected at most one of prompt, messages, text",
        ),
        ([{"ask": {"prompt": "{{ question"}}, WRITE], {}, r"recipe\.yaml: steps\.0\.ask\.prompt.*: line 1: "),
        (
            [{"ask": {"prompt": "a\n{{ b|nothing }}"}}, WRITE],
            {},
            r"steps\.0\.ask\.prompt.*: line 2: No filter named 'nothing'",
        ),
        (
            [{"ask": {"prompt": "a", "model": "judge"}}, WRITE],
            {},
            r"steps\.0\.ask\.model: models has no 'judge'; it has: teacher",
        ),
        (
            [{"ask": {"prompt": "a", "samples": 2, "temperature": 0.0}}, WRITE],
            {},
            r"steps\.0\.ask\.samples: are all the same at temp",
        ),
        ([ASK, {"read": {"regex": "a(b"}}, WRITE], {}, r"steps\.1\.read\.regex: missing \)"),
        ([ASK, {"read": {"regex": "a(b)"}}, WRITE], {}, r"steps\.1\.read\.regex: has no named group"),
        (
            [ASK, {"read": {"from": "txt", "number": "n"}}, WRITE],
            {},
            r"no column 'txt', which .*steps\.1\.read\.from reads",
        ),
        ([ASK, {"read": {"json": {"a b": "c"}}}, WRITE], {}, r"steps\.1\.read\.fields: 'a b' cannot be a field"),
        (
            [ASK, {"read": {"number": "answer"}}, WRITE],
            {},
            r"steps\.1\.read: its field 'answer' has the name of a column",
        ),
        ([ASK, {"keep": {"where": "text =="}}, WRITE], {}, r"steps\.1\.keep\.where: line 1: "),
        ([ASK, {"keep": {"equal": ["text"]}}, WRITE], {}, r"steps\.1\.keep\.equal: "),
        (
            [ASK, {"keep": {"verifier": {"task": "chain_sums"}}}, WRITE],
            {},
            r"verifier\.task: .*did you mean chain_sum\?",
        ),
        ([ASK, {"keep": {"verifier": {"task": "chain_sum"}}}, WRITE], {}, r"data\.jsonl:1: no column 'metadata'"),
        ([ASK, {"sample": {"share": 1.5}}, WRITE], {}, r"steps\.1\.sample\.share: "),
        (
            [{"sample": {"examples": {"count": 2, "file": "data.jsonl"}}}, WRITE],
            {},
            r"examples\.count: data\.jsonl has 1 rows",
        ),
        ([{"sample": {"examples": {"count": 1, "file": "none.jsonl"}}}, WRITE], {}, r"examples\.file: no such file"),
        (
            [{"ask": {"prompt": "{{ qestion }}"}}, WRITE],
            {},
            r":1: no column 'qestion', which .*prompt reads; did you mean 'question'",
        ),
        ([ASK, {"write": {"prompt": "{{ rationale }}"}}], {}, r"data\.jsonl:1: no column 'rationale'"),
        ([{"ask": {}}, {"write": {}}], {}, r"data\.jsonl:1: neither 'prompt' nor 'messages'"),
        ([{"ask": {"text": "{{ question }}"}}, WRITE], {}, r"steps\.0\.ask: raw text cannot be asked by chat"),
        (
            [ASK, WRITE],
            {"teacher": {"api": "completions"}},
            r"steps\.0\.ask: a conversation cannot be asked by completions",
        ),
        (
            [ASK, WRITE],
            {"teacher": {"address": "localhost:8000"}},
            r"models\.teacher\.address: 'localhost:8000' is not of the form",
        ),
        (
            [ASK, WRITE],
            {"teacher": {"address": "http://a:99999"}},
            r"models\.teacher\.address: 'http://a:99999' is not",
        ),
        ([ASK, WRITE], {"teacher": {"address": "http://[:::]"}}, r"models\.teacher\.address: 'http://\[:::\]' is not"),
        (
            [ASK, WRITE],
            {"teacher": {"max_model_tokens": 9}},
            r"models\.teacher\.max_model_tokens: is for a model in this process",
        ),
        ([ASK, WRITE], {"teacher": {"token_file": "nowhere"}}, r"models\.teacher\.token_file: cannot read nowhere"),
        ([ASK, WRITE], {"teacher": {"token_variable": "NOT_SET"}}, r"token_variable: \$NOT_SET is not set"),
        ([ASK, WRITE], {"teacher": {"adress": "x"}}, r"models\.teacher\.adress: unknown key"),
        ([ASK, WRITE], {"budget": {"money": 1.0}}, r"budget\.money: no model has prices"),
        (
            [ASK, WRITE],
            {"teacher": {"address": None, "model": "/nowhere", "retry_s": 1.0}},
            r"models\.teacher\.model: .*nowhere",
        ),
    ],
)
def test_a_wrong_recipe(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, steps: list[Any], others: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(bench.folder)
    data, server = bench.data({"question": "q", "answer": "a"}), Server(question_of)
    with pytest.raises(InputError, match=message) as error:
        bench.run(bench.recipe(*steps, **others), data, server)
    assert "\n" not in str(error.value) and server.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl: no rows"),
        ('{"question": "a"}\n{"question": "b"\n', r"data\.jsonl:2: bad JSON"),
        ('{"question": "a"}\n[1]\n', r"data\.jsonl:2: a row is an object"),
        ('{"question": "a"}\n{"question": null}\n', r"data\.jsonl:2: no column 'question'"),
        ('{"question": "a"}\n{"q": 1}\n', r"data\.jsonl:2: no column 'question', which .*; its columns: q"),
    ],
)
def test_a_wrong_input(bench: Bench, content: str, message: str) -> None:
    data, server = bench.folder / "data.jsonl", Server(question_of)
    data.write_text(content)
    with pytest.raises(InputError, match=message):
        bench.run(bench.recipe(ASK, WRITE), data, server)
    assert server.asked == []


def test_a_default_makes_a_column_optional(bench: Bench) -> None:
    recipe = bench.recipe(
        {"ask": {"prompt": "{{ question }}{{ hint|default('!') }}{% if more is defined %}{{ more }}{% endif %}"}}, WRITE
    )
    data = bench.data({"question": "a"}, {"question": "b", "hint": "?", "more": "+"})
    rows = bench.run(recipe, data, question_of)[1]
    assert [row["completion"][0]["content"] for row in rows] == ["a!", "b?+"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("out.json", r"--out: .* let its name end in \.jsonl"),
        ("no/out.jsonl", "--out: there is no folder"),
        ("data.jsonl", "exists, and nothing is written over"),
    ],
)
def test_an_output_that_cannot_be(bench: Bench, out: str, message: str) -> None:
    data = bench.data({"question": "a"})
    before = data.read_bytes()
    with pytest.raises(InputError, match=message):
        bench.run(bench.recipe(ASK, WRITE), data, question_of, out=out)
    assert data.read_bytes() == before


@pytest.mark.parametrize("beside", ["out.card.md", "out.html"])
def test_what_would_stand_beside_is_not_written_over(bench: Bench, beside: str) -> None:
    (bench.folder / beside).write_text("mine")
    with pytest.raises(InputError, match=rf"--out: .*{beside} exists"):
        bench.run(bench.recipe(ASK, WRITE), bench.data({"question": "a"}), question_of)
    assert (bench.folder / beside).read_text() == "mine"


def test_two_at_once_do_not_write_one_file(bench: Bench) -> None:
    data, recipe = bench.data({"question": "a"}), bench.recipe(ASK, WRITE)

    def reply(body: dict[str, Any]) -> str:
        other = AuthorRun(Recipe.read(recipe), str(data), bench.folder / "out.jsonl", store=bench.folder / "b.sqlite")
        with pytest.raises(InputError, match="another gkd author is writing"):
            other.run()
        return "one"

    assert len(bench.run(recipe, data, reply)[1]) == 1


def test_a_file_that_another_has_finished_meanwhile_stays(bench: Bench) -> None:
    data, recipe = bench.data({"question": "a"}), bench.recipe(ASK, WRITE)
    late = AuthorRun(Recipe.read(recipe), str(data), bench.folder / "out.jsonl", transport=Server(lambda _: "late"))
    late.check()
    _, rows = bench.run(recipe, data, lambda _: "first")
    with pytest.raises(InputError, match=r"--out: .*out\.jsonl was written by another gkd author meanwhile"):
        late.run()
    assert [json.loads(line) for line in (bench.folder / "out.jsonl").read_text().splitlines()] == rows
    assert (bench.folder / "out.card.md").exists()


def test_what_a_process_left_that_was_killed_behind_its_card_is_written_over(bench: Bench) -> None:
    (bench.folder / ".out.jsonl.part").write_text("half a row")
    (bench.folder / "out.card.md").write_text("of nothing")
    _, rows = bench.run(bench.recipe(ASK, WRITE), bench.data({"question": "a"}), question_of)
    assert len(rows) == 1 and "of nothing" not in (bench.folder / "out.card.md").read_text()


def test_a_failure_behind_the_card_takes_it_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(made: object) -> None:
        raise OSError(28, "No space left on device")

    recipe, data = bench.recipe(ASK, WRITE), bench.data({"question": "a"})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("gkd.author.run.write_page", full)
        bench.run(recipe, data, question_of)
    assert len(bench.run(recipe, data, question_of)[1]) == 1


def test_overrides(bench: Bench) -> None:
    recipe = Recipe.read(bench.recipe(ASK, WRITE), ["models.teacher.model=other", "seed=3"])
    assert recipe.form.models["teacher"].model == "other" and recipe.form.seed == 3


def test_a_row_read_from_parquet(bench: Bench) -> None:
    import pyarrow
    import pyarrow.parquet

    path = bench.folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b"], "id": [1, 2]}), path)
    rows = bench.run(bench.recipe(ASK, {"write": {"prompt": "{{ id }}"}}), path, question_of)[1]
    assert [row["prompt"][0]["content"] for row in rows] == ["1", "2"]


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such config file"):
        Recipe.read(tmp_path / "none.yaml")
