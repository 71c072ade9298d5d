"""Every recipe of configs/recipes makes data that its training config trains on, at the size of the tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from author_runs import Server, dropped, question_of
from bare_runs import STEPS, Bare, ran
from launching import REPOSITORY

from gkd.author import AuthorRun, Recipe
from gkd.config import load_config

RECIPES = REPOSITORY / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith(".train"))
PROBLEMS = RECIPES / "problems.jsonl"
pytestmark = pytest.mark.usefixtures("sampling_here")


def problems(count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:count]]


def gold() -> dict[str, str]:
    return {row["question"]: row["answer"] for row in problems(6)}


def solver(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """A teacher that finds the right answer two times out of three, and says so in words that its seed decides."""
    right = {row["question"]: row["answer"] for row in rows}

    def reply(body: dict[str, Any]) -> str:
        question = question_of(body)
        answer = next(right[asked] for asked in right if asked in question)
        words = " ".join(f"thought {(body['seed'] >> place) % 97}" for place in range(6))
        return f"First, {words}.\nAnswer: {answer if body['seed'] % 3 else 'nothing'}"

    return reply


def author(name: str, data: Path, out: Path, *overrides: str, server: Server | None = None) -> AuthorRun:
    run = AuthorRun(
        Recipe.read(RECIPES / f"{name}.yaml", overrides),
        str(data),
        out,
        transport=server,
        store=out.parent / "a.sqlite",
    )
    run.check()
    run.run()
    return run


def asked_of_a_server(
    name: str, tmp_path: Path, reply: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[AuthorRun, list[dict[str, Any]]]:
    """The run, and the rows of six problems."""
    rows, data, out = problems(6), tmp_path / "problems.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = ["models.teacher={address: http://127.0.0.1:9, model: stub}"]
    run = author(name, data, out, *server, server=Server(reply or solver(rows)))
    return run, [json.loads(line) for line in out.read_text().splitlines()]


def trained(
    name: str, data: Path, tmp_path: Path, teacher: Path, student: Path, batch_size: int = 4
) -> list[dict[str, float]]:
    config = load_config(
        RECIPES / f"{name}.train.yaml",
        [
            f"run.dir={tmp_path / 'run'}", f"run.steps={STEPS}", f"teacher={{model: {teacher}, dtype: float32}}",
            f"student={{model: {student}, dtype: float32}}", f"data.train={data}", f"data.heldout={data}",
            "data.max_prompt_tokens=400", "rollout.max_new_tokens=112", "rollout.engine=transformers",
            "optim.warmup_steps=0", f"optim.batch_size={batch_size}", "optim.micro_batch_size=2",
            "eval={prompts: 2, samples: 1}",
        ],
    )  # fmt: skip
    steps, _ = ran(Bare, config)
    assert len(steps) == STEPS and all(torch.isfinite(torch.tensor(step["loss"])) for step in steps)
    return steps


def test_seqkd(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    prompts = [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    teacher = f"models.teacher={{model: {tiny_teacher}, engine: transformers, dtype: float32}}"
    ask = "steps=[{ask: {temperature: 0.0, max_new_tokens: 8, truncated: keep}}, {write: {}}]"  # it knows no end
    run = author("seqkd", data, out, teacher, ask)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert run.made.tally.rows == 6 and 4 <= len(rows) <= 6
    assert {row["prompt"][0]["content"] for row in rows} <= {f"say {i}" for i in range(6)}
    trained("seqkd", out, tmp_path, tiny_teacher, tiny_student)


def test_fine_tune_cot(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    run, rows = asked_of_a_server("fine_tune_cot", tmp_path)
    right = gold()
    assert len(rows) > 12 and run.made.tally.given[0] == 6 and dropped(run)["wrong answer"] > 0
    for row in rows:
        rationale, _, answer = row["completion"][0]["content"].partition("\nAnswer: ")
        assert rationale.startswith("First, ") and answer == right[row["prompt"][0]["content"]]
    several = [question for question in right if sum(row["prompt"][0]["content"] == question for row in rows) > 1]
    assert several, "several ways to one answer"
    steps = trained("fine_tune_cot", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student)
    assert steps[0]["task/rationale/loss"] == pytest.approx(steps[0]["loss"], rel=1e-5)


def by_task(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """task -> (prompt, completion) of its rows."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        pair = row["prompt"][0]["content"], row["completion"][0]["content"]
        found.setdefault(row["task"], []).append(pair)
    return found


def test_step_by_step(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    asked: list[str] = []
    solve = solver(problems(6))
    _, rows = asked_of_a_server("step_by_step", tmp_path, lambda body: asked.append(question_of(body)) or solve(body))
    assert all(question.count("Reasoning: ") == 3 and question.count("Question: ") == 4 for question in asked)
    assert (
        len(set(asked)) == 6 and len({question.partition("Question:")[2].partition("\n")[0] for question in asked}) > 1
    )
    tasks = by_task(rows)
    assert [len(pairs) for pairs in tasks.values()] == [6, 6] and list(tasks) == ["label", "rationale"]
    for (label, said), (why, because) in zip(tasks["label"], tasks["rationale"], strict=True):
        assert label.removeprefix("[label] ") == why.removeprefix("[rationale] ") and said in {
            *gold().values(),
            "nothing",
        }
        assert because.startswith("First, ") and "Answer" not in because
    assert {row["task"]: row.get("weight") for row in rows} == {"label": None, "rationale": 0.5}
    steps = trained("step_by_step", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student)
    tokens = [sum(step.get(f"task/{name}/tokens", 0.0) for step in steps) for name in tasks]
    assert all(tokens) and sum(tokens) == sum(step["tokens/scored"] for step in steps)


def test_mt_cot(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    run, rows = asked_of_a_server("mt_cot", tmp_path)
    tasks, right = by_task(rows), gold()
    assert [said for _, said in tasks["label"]] == [row["answer"] for row in problems(6)]
    assert 4 <= len(tasks["chain_of_thought"]) <= 6 and dropped(run)["comes to another answer"] > 0
    for prompt, said in tasks["chain_of_thought"]:
        assert said.startswith("First, ") and said.endswith(
            f"So the answer is {right[prompt.partition(' Explain, and')[0]]}."
        )
    trained("mt_cot", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student)


def test_specialize(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    _, rows = asked_of_a_server("specialize", tmp_path)
    tasks = by_task(rows)
    assert list(tasks) == ["examples_rationale", "examples_answer", "alone_rationale", "alone_answer"]
    assert len({len(pairs) for pairs in tasks.values()}) == 1 and len(rows) > 24
    for name, pairs in tasks.items():
        for prompt, said in pairs:
            assert prompt.count("Question: ") == (3 if name.startswith("examples") else 1)
            assert said.startswith("First, ") == name.endswith("rationale") and "Answer: " in said
    short = tmp_path / "short.jsonl"  # the tiny models read 512 bytes
    short.write_text("".join(json.dumps(row) + "\n" for row in rows if row["task"].startswith("alone")))
    trained("specialize", short, tmp_path, tiny_teacher, tiny_student)


def test_best_of_n(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    right, said = gold(), dict[str, list[tuple[float, str]]]()

    def reply(body: dict[str, Any]) -> httpx.Response:
        question = question_of(body).partition("\nEnd with")[0]
        logprob, is_right = -(body["seed"] % 1000) / 1000, body["seed"] % 3 > 0
        text = f"Way {body['seed']}: <answer>{right[question] if is_right else '-1'}</answer>"
        if is_right:
            said.setdefault(question, []).append((logprob, text))
        choice = {"message": {"content": text}, "logprobs": {"content": [{"logprob": logprob}]}}
        return httpx.Response(200, json={"choices": [choice]})

    _, rows = asked_of_a_server("best_of_n", tmp_path, reply)
    assert len(said) >= 5 and max(map(len, said.values())) > 2
    assert {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows} == {
        question: max(texts)[1] for question, texts in said.items()
    }
    trained("best_of_n", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student, batch_size=2)


def test_socratic(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    right = gold()

    def reply(body: dict[str, Any]) -> str:
        result = next(right[asked] for asked in right if asked in question_of(body)) if body["seed"] % 4 else "-1"
        parts = [{"question": f"What is part {n}?", "answer": f"part {n}"} for n in range(1, 2 + body["seed"] % 3)]
        return f"Here it is: {json.dumps({'steps': parts, 'result': result})}"

    run, rows = asked_of_a_server("socratic", tmp_path, reply)
    tasks = by_task(rows)
    assert dropped(run).keys() >= {"fewer than two questions", "wrong answer"} and len(tasks["questions"]) >= 4
    for (problem, asked), (again, said) in zip(tasks["questions"], tasks["answers"], strict=True):
        question = problem.removesuffix("\nWhich questions lead to the result?")
        assert asked.startswith("1. What is part 1?\n2. ") and again.startswith(f"{question}\n1. What is part 1?\n2. ")
        assert said.startswith("1. part 1\n2. part 2") and said.endswith(f"Answer: {right[question]}")
    trained("socratic", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student)


def test_counterfactual(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    pairs = [json.loads(line) for line in (RECIPES / "entailments.jsonl").read_text().splitlines()]
    targets = {pair["hypothesis"]: pair["target"] for pair in pairs}

    def reply(body: dict[str, Any]) -> str:
        text = question_of(body)
        hypothesis, premise = (text.partition(f"{name}: ")[2].partition("\n")[0] for name in ("Hypothesis", "Premise"))
        if "Answer in one word" in text:
            return f"{targets[hypothesis].title()}." if "changed" in premise else "unclear"
        return [premise, f"{premise} in vain", f"{premise} changed {body['seed'] % 50}"][body["seed"] % 3]

    out = tmp_path / "rows.jsonl"
    server = ["models.teacher={address: http://127.0.0.1:9, model: stub}"]
    run = author("counterfactual", RECIPES / "entailments.jsonl", out, *server, server=Server(reply))
    tasks = by_task([json.loads(line) for line in out.read_text().splitlines()])
    assert [said for _, said in tasks["original"]] == [pair["label"] for pair in pairs]
    assert dropped(run).keys() >= {"nothing was changed", "judged to be another relation"}
    assert len(tasks["counterfactual"]) > 6
    for prompt, said in tasks["counterfactual"]:
        assert " changed " in prompt and said == targets[prompt.partition("Hypothesis: ")[2].partition("\n")[0]]
    trained("counterfactual", out, tmp_path, tiny_teacher, tiny_student)


def test_consistent(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    right = gold()
    _, rows = asked_of_a_server("consistent", tmp_path, lambda body: f"Because {body['seed'] % 1000}.")
    tasks = by_task(rows)
    assert list(tasks) == ["factual", "counterfactual"] and {len(pairs) for pairs in tasks.values()} == {6}
    for (prompt, said), (other, wrong) in zip(tasks["factual"], tasks["counterfactual"], strict=True):
        question = prompt.removeprefix("[factual] ")
        assert re.fullmatch(rf"Because \d+\. So the answer is {right[question]}\.", said)
        assert (
            other.startswith(f"[counterfactual] {question} Because ") and wrong == f"{int(float(right[question])) + 1}."
        )
    trained("consistent", tmp_path / "rows.jsonl", tmp_path, tiny_teacher, tiny_student)


def test_in_context(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    asked: list[str] = []
    _, rows = asked_of_a_server("in_context", tmp_path, lambda body: asked.append(question_of(body)) or "42")
    tasks = by_task(rows)
    assert [said for _, said in tasks["teacher"]] == ["42"] * 6
    assert [said for _, said in tasks["gold"]] == [row["answer"] for row in problems(6)]
    assert [prompt for prompt, _ in tasks["teacher"]] == [prompt for prompt, _ in tasks["gold"]] == asked
    assert all(prompt.count("Question: ") == 4 and prompt.endswith("Answer:") for prompt in asked)
    short = tmp_path / "short.jsonl"  # the tiny models read 512 bytes
    for row in rows:
        row["prompt"][0]["content"] = row["prompt"][0]["content"][-200:]
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained("in_context", short, tmp_path, tiny_teacher, tiny_student)


def test_hard_instructions(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    prompts = [{"messages": [{"role": "user", "content": f"do {i}"}]} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def reply(body: dict[str, Any]) -> str:
        text = question_of(body)
        if "Mark both answers" in text:
            return json.dumps({"first": 8, "second": 8 if "do 1" in text or "do 2" in text else 3})
        if "Write one new instruction" in text:
            return f"harder: {text.partition(chr(10))[0]}" if "do 3" not in text else "harder: do 4"
        return f"{body['model']} says {text}"

    server = [
        "models={teacher: {address: http://127.0.0.1:9, model: stub}, "
        "student: {address: http://127.0.0.1:8, model: stub}}"
    ]
    run = author("hard_instructions", data, out, *server, server=Server(reply))
    tasks = by_task([json.loads(line) for line in out.read_text().splitlines()])
    assert [prompt for prompt, _ in tasks["hard"]] == [f"do {i}" for i in (0, 3, 4, 5, 6, 7)]
    assert [prompt for prompt, _ in tasks["new"]] == [f"harder: do {i}" for i in (0, 4, 5, 6, 7)]
    assert all(said == f"stub says {prompt}" for pairs in tasks.values() for prompt, said in pairs)
    assert dropped(run) == {"the student answers as well": 2, "nearly said before": 1}
    trained("hard_instructions", out, tmp_path, tiny_teacher, tiny_student)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    Recipe.read(RECIPES / f"{name}.yaml")
    load_config(RECIPES / f"{name}.train.yaml")
    header = (RECIPES / f"{name}.yaml").read_text()[:900]
    assert (
        f"gkd author configs/recipes/{name}.yaml" in header and f"gkd train configs/recipes/{name}.train.yaml" in header
    )
    assert f"test_{name}" in globals(), "each runs end to end"
