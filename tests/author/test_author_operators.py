"""What each operator makes of records, seen from the rows that come out and the reasons that are counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from author_runs import Bench, chat, dropped, question_of

from gkd.author.operators.read import first_object

ASK = {"ask": {"prompt": "{{ question }}"}}
ROWS = [{"question": f"what is {i}", "answer": str(i)} for i in range(4)]


def completions(rows: list[dict[str, Any]]) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def test_a_message_becomes_a_row(bench: Bench) -> None:
    recipe = bench.recipe(
        {"ask": {"messages": [{"role": "system", "content": "Be {{ manner }}."}, {"content": "{{ question }}"}],
                 "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "stop": ["END"]}},
        {"write": {"prompt": "{{ question }}!", "completion": "{{ text|upper }}", "weight": "answer|int / 2",
                   "task": "{{ manner }}", "teacher_messages": [{"content": "{{ answer }} is known: {{ question }}"}]}},
    )  # fmt: skip
    asked: list[dict[str, Any]] = []
    rows = bench.run(recipe, bench.data({**ROWS[3], "manner": "brief"}), lambda body: asked.append(body) or "three")[1]
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "what is 3!"}],
            "completion": [{"role": "assistant", "content": "THREE"}],
            "weight": 1.5,
            "task": "brief",
            "teacher_messages": [{"role": "user", "content": "3 is known: what is 3"}],
        }
    ]
    seed = asked[0].pop("seed")
    assert 0 <= seed < 2**31
    assert asked == [
        {
            "model": "stub",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is 3"}],
            "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["END"],
        }
    ]  # fmt: skip


def test_the_rows_own_prompt_is_asked_and_written(bench: Bench) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "of the data"}]
    rows = bench.run(bench.recipe({"ask": {}}, {"write": {}}), bench.data({"messages": messages}), lambda _: "new")[1]
    assert rows == [{"prompt": messages[:1], "completion": [{"role": "assistant", "content": "new"}]}]


def test_raw_text_goes_to_completions(bench: Bench) -> None:
    recipe = bench.recipe({"ask": {"text": "{{ prompt }} ->"}}, {"write": {}}, teacher={"api": "completions"})
    import httpx

    def reply(body: dict[str, Any]) -> httpx.Response:
        assert body["prompt"] == "once ->" and "messages" not in body
        return httpx.Response(200, json={"choices": [{"text": " upon a time"}]})

    run, rows = bench.run(recipe, bench.data({"prompt": "once"}), reply)
    assert rows == [{"prompt": "once", "completion": "upon a time"}]
    assert run.made.spent.prompt_tokens == len("once ->") // 4 + 1, "a server that counts no tokens is counted for"


def test_samples_of_several_models_stand_in_order(bench: Bench) -> None:
    recipe = bench.recipe(
        {"ask": {"model": ["teacher", "other"], "prompt": "{{ question }}", "samples": 2}},
        {"write": {"prompt": "{{ question }}", "completion": "{{ text }}, {{ text_author }} {{ text_sample }}"}},
        models={
            name: {"address": f"http://127.0.0.1:{n}", "model": "stub"}
            for n, name in enumerate(("teacher", "other"), 1)
        },
    )
    seeds: set[int] = set()
    rows = bench.run(recipe, bench.data(*ROWS[:2]), lambda body: seeds.add(body["seed"]) or question_of(body))[1]
    assert completions(rows) == [
        f"what is {i}, {name} {n}" for i in range(2) for name in ("teacher", "other") for n in range(2)
    ]
    assert len(seeds) == 4, "the draw is the question's, whoever is asked"


@pytest.mark.parametrize(
    ("read", "text", "fields"),
    [
        ({"regex": r"A: (?P<a>\w+)( B: (?P<b>\w+))?"}, "so A: x", {"a": "x", "b": ""}),
        ({"json": ["a"]}, 'Sure {not json}:\n```json\n{"a": [1], "c": 2}\n```', {"a": [1]}),
        ({"json": {"b": "a"}}, '{"a": null}', {"b": None}),
        (
            {"headings": {"a": "Reason", "b": "Verdict"}},
            "## Reason\nas one\nsees\n**Verdict:** yes",
            {"a": "as one\nsees", "b": "yes"},
        ),
        ({"headings": {"a": "Step", "b": "Steps"}}, "Steps: two\nStep: one", {"a": "one", "b": "two"}),
        ({"number": "a"}, "first 12, then 1,234.50", {"a": "1234.50"}),
        ({"number": "a"}, "minus \N{MINUS SIGN}3.", {"a": "-3"}),
    ],
)
def test_read(bench: Bench, read: dict[str, Any], text: str, fields: dict[str, Any]) -> None:
    shown = {"write": {"prompt": "q", "completion": "{{ {" + ", ".join(f"'{n}': {n}" for n in fields) + "}|json }}"}}
    rows = bench.run(bench.recipe(ASK, {"read": read}, shown), bench.data(ROWS[0]), lambda _: text)[1]
    assert json.loads(completions(rows)[0]) == fields


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        ({"regex": "A: (?P<a>.)"}, "none", "the regex does not match"),
        ({"json": ["a"]}, "{", "no JSON object in the text"),
        ({"json": ["a"]}, '{"b": 1}', "the JSON object has no 'a'"),
        ({"headings": {"a": "Reason"}}, "Reasons are many", "no section 'Reason'"),
        ({"headings": {"a": "Reason"}}, "Reason:\n", "no section 'Reason'"),
        ({"number": "a"}, "none", "no number in the text"),
    ],
)
def test_what_cannot_be_read_is_counted(bench: Bench, read: dict[str, Any], text: str, reason: str) -> None:
    recipe = bench.recipe(ASK, {"read": read}, {"write": {"prompt": "q"}})
    run, rows = bench.run(recipe, bench.data(ROWS[0]), lambda _: text)
    assert rows == [] and dropped(run) == {reason: 1} and run.made.tally.rows_without == 1
    assert run.made.tally.examples[1, reason][0].detail == text.strip()


def test_a_text_that_a_regex_does_not_get_through_is_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd.author.operators.read._LIMIT_S", 0.2)
    recipe = bench.recipe(
        {"ask": {"prompt": "{{ question }}"}}, {"read": {"regex": "^(?P<word>(a+)+)$"}}, {"write": {"prompt": "p"}}
    )
    data = bench.data({"question": "a" * 60 + "!"}, {"question": "aaa"})
    run, made = bench.run(recipe, data, question_of)
    assert len(made) == 1
    assert dropped(run) == {"the text takes longer than 0.2 s of processor time to be read": 1}


def test_the_first_object() -> None:
    assert first_object("{" * 100_000) is None
    assert first_object('{"a": {"b": 1}} {"c": 2}') == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"where": "answer|int > 1"}, [2, 3]),
        ({"equal": ["text", "' WHAT  is 2. '"]}, [2]),
        ({"close": {"value": "text", "to": "2.9", "tolerance": 0.05}}, [3]),
        ({"close": {"value": "text", "to": "2.9"}}, []),
        ({"length": {"of": "text", "least": 9, "unit": "characters"}}, [0, 1, 2, 3]),
        ({"length": {"of": "text", "most": 2}}, []),
    ],
)
def test_keep(bench: Bench, keep: dict[str, Any], kept: list[int]) -> None:
    recipe = bench.recipe(ASK, {"keep": keep}, {"write": {"prompt": "{{ question }}"}})
    run, rows = bench.run(recipe, bench.data(*ROWS), question_of)
    assert completions(rows) == [f"what is {i}" for i in kept]
    assert sum(dropped(run).values()) == 4 - len(kept)


def test_a_verifier_judges(bench: Bench) -> None:
    from reasoning_gym import create_dataset

    problems = [dict(problem) for problem in create_dataset("chain_sum", size=3, seed=0)]
    recipe = bench.recipe(ASK, {"keep": {"verifier": {"task": "chain_sum"}}}, {"write": {"prompt": "{{ question }}"}})
    right = {problem["question"]: problem["answer"] for problem in problems[:2]}
    run, rows = bench.run(recipe, bench.data(*problems), lambda body: right.get(question_of(body), "17 or so"))
    assert completions(rows) == [problem["answer"] for problem in problems[:2]]
    assert dropped(run) == {"wrong, by the verifier of chain_sum": 1}


def test_a_judge_is_one_more_question(bench: Bench) -> None:
    recipe = bench.recipe(
        ASK,
        {"ask": {"prompt": "Is {{ text }} good?", "into": "verdict", "temperature": 0.0}},
        {"keep": {"where": "'yes' in verdict|lower", "reason": "judged bad"}},
        {"write": {"prompt": "{{ question }}"}},
    )

    def reply(body: dict[str, Any]) -> str:
        text = question_of(body)
        return ("Yes." if "2" in text else "No.") if text.startswith("Is") else text

    run, rows = bench.run(recipe, bench.data(*ROWS), reply)
    assert completions(rows) == ["what is 2"] and dropped(run) == {"judged bad": 3}


def test_distinct(bench: Bench) -> None:
    texts = iter(["a b c d e f", "A b, c d e f!", "a b c d e g", "x y z"])
    said: dict[int, str] = {}
    for ngram, kept in ((0, 3), (2, 2)):
        ask = {"ask": {"prompt": "q", "samples": 4}}
        recipe = bench.recipe(ask, {"distinct": {"ngram": ngram, "overlap": 0.6}}, {"write": {"prompt": "q"}})
        _, rows = bench.run(
            recipe, bench.data({"a": 1}), lambda body: said.setdefault(body["seed"], next(texts)), out=f"{ngram}.jsonl"
        )
        assert len(rows) == kept


@pytest.mark.parametrize(("among", "kept"), [("row", 40), ("all", 10)])
def test_distinct_among_all_goes_by_the_order_of_the_rows(bench: Bench, among: str, kept: int) -> None:
    recipe = bench.recipe(ASK, {"distinct": {"among": among}}, {"write": {"prompt": "{{ number }}"}})
    data = bench.data(*[{"question": f"q {i % 10}", "number": f"row {i}"} for i in range(40)])
    rows = bench.run(recipe, data, question_of)[1]
    assert [row["prompt"][0]["content"] for row in rows] == [f"row {i}" for i in range(kept)]


def test_sample_takes_the_best_or_draws(bench: Bench) -> None:
    def rows_of(sample: dict[str, Any], out: str) -> list[str]:
        recipe = bench.recipe(
            {"ask": {"prompt": "{{ question }}", "samples": 4}}, {"sample": sample},
            {"write": {"prompt": "{{ question }}", "completion": "{{ text }} {{ text_sample }}"}},
        )  # fmt: skip
        return completions(bench.run(recipe, bench.data(*ROWS), question_of, out=out)[1])

    assert rows_of({"most": 9, "best": "(-text)|length"}, "none.jsonl") == [], "what cannot be ranked is dropped"
    assert rows_of({"most": 1, "best": "-text_sample"}, "best.jsonl") == [f"what is {i} 0" for i in range(4)]
    drawn = rows_of({"most": 2}, "drawn.jsonl")
    assert len(drawn) == 8 and drawn != rows_of({"most": 2, "best": "-text_sample"}, "first.jsonl")
    assert drawn == rows_of({"most": 2}, "again.jsonl"), "the draw is the recipe's and the row's"
    assert 2 <= len(rows_of({"share": 0.5}, "half.jsonl")) <= 14


def test_examples_are_of_other_rows(bench: Bench) -> None:
    data = bench.data(*ROWS)
    worked = bench.data(*[{**row, "rationale": "because"} for row in ROWS], name="worked.jsonl")
    recipe = bench.recipe(
        {"sample": {"examples": {"count": 2, "file": str(worked)}}},
        {"ask": {"prompt": "{% for e in examples %}{{ e.question }} -> {{ e.answer }}\n{% endfor %}{{ question }}"}},
        {"write": {"prompt": "{{ question }}"}},
    )
    for row, text in zip(ROWS, completions(bench.run(recipe, data, question_of)[1]), strict=True):
        *shown, own = text.split("\n")
        assert own == row["question"] and len(set(shown)) == 2
        assert all(line in {f"{r['question']} -> {r['answer']}" for r in ROWS if r is not row} for line in shown)


def test_what_was_cut_off_is_left_out_unless_it_is_wanted(bench: Bench) -> None:
    for truncated, kept in (("drop", 0), ("keep", 1)):
        ask = {"ask": {"prompt": "{{ question }}", "max_new_tokens": 5, "truncated": truncated}}
        recipe = bench.recipe(ask, {"write": {"prompt": "q", "completion": "{{ text }} {{ text_finish_reason }}"}})
        run, rows = bench.run(recipe, bench.data(ROWS[0]), lambda _: chat("half", "length"), out=f"{truncated}.jsonl")
        assert completions(rows) == ["half length"][:kept]
        assert kept or dropped(run) == {"cut off at max_new_tokens = 5": 1}


def test_rows_that_training_would_refuse_are_counted(bench: Bench) -> None:
    recipe = bench.recipe(ASK, {"write": {"prompt": "{{ question }}", "weight": "answer|int - 1"}})
    said = {0: "a weight below nothing", 1: "fine", 2: "NUL \0", 3: "  "}
    run, rows = bench.run(recipe, bench.data(*ROWS), lambda body: said[int(question_of(body)[-1])])
    assert completions(rows) == ["fine"]
    assert dropped(run) == {"no row that can be trained on": 2, "an empty completion": 1}


def test_several_rows_of_one_record(bench: Bench) -> None:
    recipe = bench.recipe(
        {"write": {"prompt": "{{ question }}", "completion": "{{ answer }}", "task": "label"}}, ASK,
        {"write": {"prompt": "{{ question }} Why?", "weight": 0.5, "task": "rationale"}},
    )  # fmt: skip
    rows = bench.run(recipe, bench.data(*ROWS[:2]), lambda _: "because")[1]
    assert [(row["task"], row.get("weight")) for row in rows] == [("label", None), ("rationale", 0.5)] * 2


def test_templates_are_in_a_sandbox_and_texts_of_models_are_values(bench: Bench) -> None:
    recipe = bench.recipe(ASK, {"write": {"prompt": "{{ question }}", "completion": "{{ text }}"}})
    rows = bench.run(recipe, bench.data(ROWS[0]), lambda _: "{{ 7 * 7 }}")[1]
    assert completions(rows) == ["{{ 7 * 7 }}"]
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    recipe = bench.recipe(ASK, {"write": {"prompt": "{{ question }}", "completion": attack}})
    run, rows = bench.run(recipe, bench.data(ROWS[0]), lambda _: "x", out="attack.jsonl")
    assert rows == [] and dropped(run) == {"a template or expression fails": 1}
