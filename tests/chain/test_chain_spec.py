"""What a chain's file says: rounds, references, and every mistake before a stage has run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gkd.chain.spec import Chain, Reference, read_chain
from gkd.errors import ConfigError

ROOT = Path(__file__).parents[2]
TRAIN = {"name": "a", "file": "base.yaml"}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("name: r\nmodels: {teacher: {model: t}}\nsteps: [{ask: {}}, {write: {}}]\n")
    Path("base.yaml").write_text("teacher: {model: t}\nstudent: {model: s}\ndata: {train: d.jsonl}\n")


def chain_of(*stages: Any, **others: Any) -> Chain:
    Path("chain.yaml").write_text(yaml.safe_dump({"name": "c", "stages": list(stages), **others}))
    return read_chain(Path("chain.yaml"))


def test_a_reference_is_to_the_newest_stage_of_that_name() -> None:
    from_a = {"teacher.model": {"stage": "a"}, "student": {"model": {"stage": "a"}}, "optim.lr": 1e-3}
    chain = chain_of(
        TRAIN, {**TRAIN, "name": "b", "overrides": from_a}, {"name": "e", "run": "eval", "file": {"stage": "b"}}
    )
    b, e = chain.stages[1:]
    assert b.overrides == {"teacher.model": Reference("a"), "student.model": Reference("a"), "optim.lr": 1e-3}
    assert (e.file, e.needs, e.folder) == (Reference("b"), ["b"], Path("runs/c/e"))


def test_rounds_are_written_out() -> None:
    inner = {
        "name": "s",
        "file": "base.yaml",
        "overrides": {"teacher.model": {"stage": "s", "round": "previous", "first": "t"}, "run.seed": "{{round}}"},
    }
    after = {"name": "last", "run": "eval", "file": {"stage": "s"}}
    same_round = {"name": "check_{{round}}_of_3", "run": "eval", "file": {"stage": "s"}}
    chain = chain_of({"repeat": 3, "stages": [inner, same_round]}, after)
    names = ["s_1", "check_1_of_3", "s_2", "check_2_of_3", "s_3", "check_3_of_3", "last"]
    assert [stage.name for stage in chain.stages] == names
    assert [s.overrides["teacher.model"] for s in chain.stages[:6:2]] == ["t", Reference("s_1"), Reference("s_2")]
    assert [s.overrides["run.seed"] for s in chain.stages[:6:2]] == [1, 2, 3]
    assert [s.file for s in chain.stages[1:6:2]] == [Reference("s_1"), Reference("s_2"), Reference("s_3")]
    assert chain.stages[-1].file == Reference("s_3")


def test_previous_reaches_before_the_repeat() -> None:
    inner = {**TRAIN, "overrides": {"teacher.model": {"stage": "a", "round": "previous"}}}
    chain = chain_of(TRAIN, {"repeat": 2, "stages": [inner]})
    assert [stage.overrides.get("teacher.model") for stage in chain.stages] == [None, Reference("a"), Reference("a_1")]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{**TRAIN, "runs": "train"}], r"stages\.0: runs: unknown key; did you mean run\?"),
        ([{**TRAIN, "run": "auth"}], r"stages\.0: run: input should be 'train', 'eval' or 'author', not 'auth'"),
        ([{**TRAIN, "run": "author"}], r"stages\.0\.data: is missing: the rows that gkd author starts from"),
        ([{**TRAIN, "data": "d.jsonl"}], r"stages\.0\.data: is for run: author; the config of a train names its data"),
        (
            [
                {
                    **TRAIN,
                    "run": "author",
                    "file": "recipe.yaml",
                    "data": "d.jsonl",
                    "overrides": {"models.x.modle": "y"},
                }
            ],
            r"stages\.0: recipe\.yaml: models\.x",
        ),
        (
            [
                {"name": "w", "run": "author", "file": "recipe.yaml", "data": "d.jsonl"},
                {"name": "e", "run": "eval", "file": {"stage": "w"}},
            ],
            r"stages\.1\.file: w is no train, and has no config",
        ),
        ([{**TRAIN, "name": "a/b"}], r"stages\.0\.name: 'a/b' must be letters"),
        ([TRAIN, TRAIN], r"stages\.1\.name: another stage is called 'a' already"),
        ([{**TRAIN, "file": "none.yaml"}], r"stages\.0: none\.yaml: no such config file"),
        ([{**TRAIN, "overrides": {"optim.l": 1}}], r"stages\.0: base\.yaml: optim\.l: unknown key"),
        ([{**TRAIN, "overrides": {"run.dir": "x"}}], r"stages\.0\.overrides: run\.dir is runs/c/a"),
        (
            [{**TRAIN, "overrides": {"teacher.model": {"stage": "b"}}}],
            r"stages\.0\.overrides\.teacher\.model: no stage before it is called 'b' \(there are: none\)",
        ),
        (
            [{"repeat": 2, "stages": [{**TRAIN, "overrides": {"teacher.model": {"stage": "a", "round": "previous"}}}]}],
            r"stages\.0\.stages\.0\.overrides\.teacher\.model: no stage .* give the first round something with first:",
        ),
        (
            [{**TRAIN, "file": {"stage": "a", "round": "previous"}}],
            r"stages\.0\.file: round and first are for stages of",
        ),
        ([TRAIN, {"name": "b", "file": {"stage": "a"}}], r"stages\.1\.file: where run is train it is a file"),
        (
            [
                TRAIN,
                {"name": "e", "run": "eval", "file": {"stage": "a"}},
                {"name": "f", "run": "eval", "file": {"stage": "e"}},
            ],
            r"stages\.2\.file: e is no train, and has no config",
        ),
        (
            [
                TRAIN,
                {"name": "e", "run": "eval", "file": {"stage": "a"}},
                {**TRAIN, "name": "f", "overrides": {"student.model": {"stage": "e"}}},
            ],
            r"stages\.2\.overrides\.student\.model: e is an eval, which makes nothing to go on with",
        ),
        (
            [TRAIN, {"name": "w", "run": "author", "file": "recipe.yaml", "data": {"stage": "a"}}],
            r"stages\.1\.data: has to be rows, and a brings a model",
        ),
        (
            [
                {"name": "w", "run": "author", "file": "recipe.yaml", "data": "d.jsonl"},
                {**TRAIN, "overrides": {"student.model": {"stage": "w"}}},
            ],
            r"stages\.1\.overrides\.student\.model: has to be a model, and w brings rows",
        ),
        (
            [TRAIN, {**TRAIN, "name": "b", "overrides": {"data.train": {"stage": "a"}}}],
            r"stages\.1\..*: has to be rows",
        ),
        ([{"repeat": 0, "stages": [TRAIN]}], r"stages\.0: repeat: input should be greater than or equal to 1"),
        ([{"repeat": 2, "stages": [{"repeat": 2, "stages": []}]}], r"stages\.0\.stages\.0: name: is missing"),
    ],
)
def test_what_is_wrong_is_named(stages: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^chain\.yaml: " + message):
        chain_of(*stages)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/chains").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_chain_that_ships_is_one(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chain = read_chain(recipe)
    assert chain.name == recipe.stem
    assert any(stage.needs for stage in chain.stages)
