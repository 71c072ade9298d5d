"""The recipes of the page load, and the one that is whole does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from author_runs import Bench, dropped, question_of

from gkd.author.spec import RecipeForm
from gkd.config import make_section

PAGE = (Path(__file__).parents[2] / "docs" / "author.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def test_a_recipe_of_ones_own_in_fifteen_lines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-token-of-the-tests")
    assert BLOCKS[0].count("\n") <= 15
    recipe = bench.folder / "mine.yaml"
    recipe.write_text(BLOCKS[0].replace("gpt-4o-mini", "stub"))

    def reply(body: dict[str, Any]) -> str:
        question = question_of(body)
        if question.startswith("Is this sound?"):
            assert body["temperature"] == 0.0
            return "No." if "bad" in question else "Yes."
        kind = body["seed"] % 3
        return (
            f"{['bad', 'good', 'quite good'][kind]} way {body['seed']} to it {body['seed'] * 7}\nAnswer: {kind and 4}"
        )

    rows = [{"question": f"what is 2 + 2, {i}?", "answer": "4"} for i in range(30)]
    run, made = bench.run(recipe, bench.data(*rows), reply)
    assert dropped(run).keys() >= {"wrong answer", "not among the best"} and 30 <= len(made) <= 60
    for row in made:
        assert (
            re.fullmatch(r"(quite )?good way .*\nAnswer: 4", row["completion"][0]["content"])
            and row["task"] == "reason"
        )


def test_the_models_of_the_page_are_models() -> None:
    values = yaml.safe_load(BLOCKS[1])
    form = make_section(RecipeForm, {**values, "steps": [{"write": {}}]}, "page")
    assert list(form.models) == ["here", "vllm_serve", "api"] and form.budget.money == 5.0


def test_every_key_of_a_step_is_on_the_page() -> None:
    fields = {
        field.alias or name
        for step in ("AskForm", "ReadForm", "KeepForm", "DistinctForm", "SampleForm", "WriteForm")
        for name, field in getattr(__import__("gkd.author.spec", fromlist=[step]), step).model_fields.items()
    }
    table = PAGE[PAGE.index("| step | keys |") : PAGE.index("A judge, a classifier")]
    assert not {name for name in fields if not re.search(rf"\b{name}\b", table)}
