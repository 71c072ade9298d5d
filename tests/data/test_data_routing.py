"""Which teacher a prompt has: by its row, or by a draw that nothing else can change."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gkd.config import Config, make_config
from gkd.data.formats import read_rows, read_table
from gkd.data.routing import check_teacher_names, teacher_draw
from gkd.errors import ConfigError, DataError

ROWS = 4000


def names(weights: dict[str, float], seed: int = 0, split: str = "train") -> list[str]:
    return [*map(teacher_draw(weights, seed, split), range(ROWS))]


def test_shares_are_the_weights() -> None:
    drawn = names({"math": 0.5, "code": 0.2})
    shares = [drawn.count(name) / len(drawn) for name in ("math", "code", "main")]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert set(names({"math": 1.0})) == {"math"} and set(names({})) == {"main"}


def test_a_draw_depends_on_seed_split_and_prompt_alone() -> None:
    drawn = names({"math": 0.5})
    assert drawn == names({"math": 0.5})
    assert drawn != names({"math": 0.5}, seed=1) and drawn != names({"math": 0.5}, split="heldout")
    backwards = [*map(teacher_draw({"math": 0.5}, 0, "train"), reversed(range(ROWS)))]
    assert backwards[::-1] == drawn


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_names_it(tmp_path: Path, suffix: str) -> None:
    values = [{"prompt": "a", "tutor": "code"}, {"prompt": "b", "tutor": None}, {"prompt": "c", "tutor": "main"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    rows = read_rows(str(path), "train", teacher_column="tutor")
    assert [row.teacher for row in rows] == ["code", None, "main"]
    check_teacher_names(rows, ["main", "code"], "tutor")
    place = f"{path}:{1 if suffix == 'jsonl' else 0}"
    with pytest.raises(DataError, match=f"{place}: tutor: there is no teacher 'code'; known: main, math"):
        check_teacher_names(rows, ["main", "math"], "tutor")


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "tutor": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: tutor: expected a teacher's name, not a number"):
        read_rows(str(path), "train", teacher_column="tutor")
    assert read_table(str(path), "train").ignored == {"tutor": 1}
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), table)
    with pytest.raises(DataError, match="no column 'tutor'"):
        read_rows(str(table), "train", teacher_column="tutor")


def config(others: dict[str, dict[str, object]], **data: object) -> Config:
    others = {name: {"model": name, **keys} for name, keys in others.items()}
    return make_config(
        {"teacher": {"model": "t"}, "other_teachers": others, "student": {"model": "s"}, "data": {"train": "d", **data}}
    )


def test_the_config_says_one_of_the_two() -> None:
    assert list(config({"code": {"weight": 0.4}}).teachers) == ["main", "code"]
    assert list(config({"code": {}}, teacher_column="tutor").teachers) == ["main", "code"]
    for others, data, message in (
        ({"code": {}}, {}, r"other_teachers\.code\.weight: is 0 and data\.teacher_column null"),
        ({"code": {"weight": 0.4}}, {"teacher_column": "tutor"}, r"other_teachers\.code\.weight: is 0\.4, but data"),
        ({"a": {"weight": 0.6}, "b": {"weight": 0.6}}, {}, r"the weights add up to 1\.2, which is more than 1"),
        ({"main": {"weight": 0.5}}, {}, "'main' is no name for one"),
        ({"a b": {"weight": 0.5}}, {}, "'a b' is no name for one"),
        ({"a": {"weight": 0.5, "placement": "served"}}, {}, r"other_teachers\.a\.addresses: a served teacher needs"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(others, **data)  # pyright: ignore
