"""Every accepted row, and file:line for every row that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gkd.data.formats import Row, near_miss, read_rows, read_table
from gkd.errors import DataError

USER = {"role": "user", "content": "Why is the sky blue?"}
ANSWER = {"role": "assistant", "content": "Because of scattering."}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes | str], str]:
    """Writes a JSONL file and returns its path."""

    def write_file(content: bytes | str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


# ---- what is accepted


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "Once"}, Row("", prompt_text="Once")),
        ({"prompt": "Once", "completion": " upon"}, Row("", prompt_text="Once", completion_text=" upon")),
        ({"prompt": [USER]}, Row("", messages=(USER,))),
        ({"prompt": [USER], "completion": [ANSWER]}, Row("", messages=(USER,), completion_messages=(ANSWER,))),
        ({"prompt": [USER], "completion": ANSWER["content"]}, Row("", messages=(USER,), completion_messages=(ANSWER,))),
        ({"messages": [USER]}, Row("", messages=(USER,))),
        ({"messages": [USER, ANSWER]}, Row("", messages=(USER,), completion_messages=(ANSWER,))),
        ({"messages": [USER, ANSWER, USER]}, Row("", messages=(USER, ANSWER, USER))),
        ({"messages": []}, Row("", messages=())),  # empty: for the policy of empty prompts to judge
        ({"prompt": "Once", "completion": None}, Row("", prompt_text="Once")),  # null means absent
    ],
)
def test_accepted_rows(write: Callable[[str], str], value: object, expected: Row) -> None:
    path = write(json.dumps(value))
    (row,) = read_rows(path, "train")
    assert row == Row(
        f"{path}:1", expected.messages, expected.prompt_text, expected.completion_messages, expected.completion_text
    )


@pytest.mark.parametrize(
    ("value", "weight"), [({"weight": 2}, 2.0), ({"weight": 0.0}, 0.0), ({"weight": None}, 1.0), ({}, 1.0)]
)
def test_the_weight_of_a_row(write: Callable[[str], str], value: dict[str, object], weight: float) -> None:
    (row,) = read_rows(write(json.dumps({"prompt": "Once", **value})), "train")
    assert row.weight == weight


def test_bom_blank_lines_and_line_ends(write: Callable[[bytes], str]) -> None:
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}')
    rows = read_rows(path, "train")
    assert [row.prompt_text for row in rows] == ["a", "b\u2028c"]  # U+2028 is text, not the end of a line
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:4"]


# ---- what is not


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "bad JSON at column 15"),
        ('{"prompt": "a", }', "bad JSON"),
        ("[" * 100_000, "bad JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "bad JSON"),
        ('["a"]', "a row is an object, not a list"),
        ('"a"', "a row is an object, not text"),
        ("null", "a row is an object, not null"),
        ("{}", "neither 'prompt' nor 'messages'; expected {\"prompt\""),
        ('{"completion": "a"}', "neither 'prompt' nor 'messages'"),
        ('{"prompt": null}', "neither 'prompt' nor 'messages'"),
        ('{"prompt": "a", "prompt": "b"}', "bad JSON: key 'prompt' stands twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "key 'content' stands twice"),
        ('{"promt": "a"}', "unknown key 'promt'; did you mean 'prompt'? Rename it, or remove it"),
        ('{"prompt": "a", "Completion": null}', "unknown key 'Completion'; did you mean 'completion'?"),
        ('{"prompt": "a\\u001b\\n", "m\\nessage": 1}', "unknown key 'm\\nessage'; did you mean 'messages'?"),
        ('{"prompt": 3}', "prompt: expected text or a list of messages, not a number"),
        ('{"prompt": true}', "not true or false"),
        ('{"prompt": "a", "completion": []}', "completion: must be text like the prompt, not a list"),
        ('{"prompt": [], "completion": 1}', "completion: expected a list of messages, not a number"),
        ('{"prompt": [], "completion": [{"role": "user", "content": "b"}]}', "one message, of the"),
        ('{"prompt": [], "completion": []}', "one message, of the assistant's"),
        ('{"prompt": [{"role": "assistant", "content": "b"}]}', "move it to 'completion'"),
        ('{"messages": {}}', "messages: expected a list of messages, not an object"),
        ('{"messages": ["hello"]}', "messages[0]: a message is an object with 'role' and 'content'"),
        ('{"messages": [{"content": "a"}]}', "messages[0]: no 'role'"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: no 'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0]: no 'content'"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "role: 'human' is unknown; known: system"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "messages[0].role: ['user'] is unknown"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "expected text, not a list"),
        ('{"messages": [{"role": "user", "content": "a", "tools": "b"}]}', "unknown key 'tools'"),
        ('{"prompt": "a", "weight": -1}', "weight: expected a number from 0 on, not -1"),
        ('{"prompt": "a", "weight": NaN}', "weight: expected a number from 0 on, not nan"),
        ('{"prompt": "a", "weight": Infinity}', "weight: expected a number from 0 on, not inf"),
        ('{"prompt": "a", "weight": true}', "weight: expected a number from 0 on, not true or false"),
        ('{"prompt": "a", "weight": "2"}', "weight: expected a number from 0 on, not text"),
        ('{"prompt": "a", "weigth": 2}', "unknown key 'weigth'; did you mean 'weight'?"),
        ('{"prompt": "a\\u0000b"}', "prompt: holds a NUL character"),
        ('{"messages": [{"role": "user", "content": "a\\u0000"}]}', "messages[0].content: holds a NUL"),
        ('{"prompt": "a\0b"}', "NUL character at column 14"),
        ('{"prompt": "a\\ud83d"}', "half a surrogate pair at character 1"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 16 of the line"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "bad JSON"),  # a byte order mark anywhere but at the start
    ],
)  # fmt: skip
def test_rejected_rows(write: Callable[[bytes], str], line: str | bytes, message: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = write(b'{"prompt": "fine"}\n\n' + raw + b'\n{"prompt": "fine"}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path, "train")
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_rows(write: Callable[[str], str]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        read_rows(write("\n\n"), "train")


def test_utf16_file(write: Callable[[bytes], str]) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not UTF-8"):
        read_rows(write('{"prompt": "a"}'.encode("utf-16")), "train")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("promt", "prompt"), ("Prompt", "prompt"), ("prompts", "prompt"), ("pormpt", "prompt"), ("prompt ", "prompt"),
        ("message", "messages"), ("mesage", "messages"), ("completions", "completion"), ("com-pletion", "completion"),
        ("tutr", "tutor"), ("prompt_id", None), ("id", None), ("source", None), ("response", None), ("text", None),
        ("chosen", None), ("", None), ("compilation_date", None),
    ],
)  # fmt: skip
def test_which_names_are_slips_of_the_pen(name: str, meant: str | None) -> None:
    assert near_miss(name, ("prompt", "completion", "messages", "tutor")) == meant


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_one_rule_for_columns_in_all_formats(tmp_path: Path, hub_cache: None, kind: str) -> None:
    def source(rows: list[dict[str, object]]) -> str:
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = pyarrow.Table.from_pylist(rows)
            if kind == "parquet":
                pyarrow.parquet.write_table(table, path)
            else:
                import datasets

                datasets.Dataset(table).save_to_disk(str(path))
        return str(path)

    rows = [{"id": i, "prompt": "a", "source": "web", "completion": None} for i in range(3)]
    table = read_table(source(rows), "train")
    assert [row.prompt_text for row in table.rows] == ["a"] * 3
    assert table.ignored_line("data.train") == "data.train: columns that nothing reads: id (3 rows), source (3 rows)"
    assert read_table(source([{"prompt": "a"}]), "train").ignored_line("data.train") is None

    path = source([{"prompt": "shown elsewhere", "messages": [USER, ANSWER]}])
    table = read_table(path, "train")
    assert table.rows[0].completion_messages == (ANSWER,)
    assert table.ignored == {"prompt beside messages": 1}

    with pytest.raises(DataError, match=r"rows\.\w+(:1)?: unknown key 'promt'; did you mean 'prompt'\?"):
        read_table(source([{"prompt": "a", "promt": "b"}]), "train")
    with pytest.raises(DataError, match=r"no column 'tutor' \(data\.teacher_column\); its columns: (prompt|id), "):
        read_table(source([{"prompt": "a", "id": 3}]), "train", teacher_column="tutor")


@pytest.mark.parametrize("path", ["no/such/folder/train", "missing.jsonl", "data/missing.parquet"])
def test_missing_file_names_the_config_key(path: str) -> None:
    with pytest.raises(DataError, match=r"^data\.heldout: no such file: .*JSONL"):
        read_rows(path, "test", key="data.heldout")


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-this-name/rows.jsonl", "a\0b"])
def test_what_cannot_be_a_path(path: str) -> None:
    with pytest.raises(DataError, match=r"^data\.train: "):
        read_rows(path, "train")


def test_the_check_is_light() -> None:
    """The command line checks the data before it pays for torch."""
    code = (
        "import sys; from gkd.data.formats import read_rows; import gkd.data.order;"
        "assert len(read_rows('configs/prompts/train.jsonl', 'train')) >= 300;"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


# ---- tables


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` writes out of the user's cache."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([
        {"id": 7, "prompt": "shown elsewhere", "messages": [USER, ANSWER]},
        {"id": 8, "prompt": "alone", "messages": None},
    ])  # fmt: skip
    pyarrow.parquet.write_table(table, path)
    assert read_rows(str(path), "train") == [
        Row(f"{path}:0", messages=(USER,), completion_messages=(ANSWER,)),
        Row(f"{path}:1", prompt_text="alone"),
    ]


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 half a download")
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet"):
        read_rows(str(path), "train")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), path)
    with pytest.raises(DataError, match="no column 'prompt' or 'messages'; its columns: question"):
        read_rows(str(path), "train")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"rows\.parquet: column 'prompt' stands twice"):
        read_rows(str(path), "train")
    offsets, letters = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xc3\x28")
    bad_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, letters])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad_text}), path)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet: 'utf-8' codec can't decode"):
        read_rows(str(path), "train")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:1: neither 'prompt'"):
        read_rows(str(path), "train")


def test_datasets_folders(tmp_path: Path, hub_cache: None) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"prompt": [USER], "completion": [ANSWER]}])
    expected = [Row("", messages=(USER,), completion_messages=(ANSWER,))]

    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(json.dumps({"prompt": [USER], "completion": [ANSWER]}))
    for name in ("one", "splits", "files"):
        folder = str(tmp_path / name)
        rows = read_rows(folder, "train")
        assert [row.origin for row in rows] == [f"{folder}:0"]
        assert [row.messages for row in rows] == [row.messages for row in expected]
        assert [row.completion_messages for row in rows] == [row.completion_messages for row in expected]

    with pytest.raises(DataError, match=r"^data\.heldout_split: .* has no split 'test'; it has: train"):
        read_rows(str(tmp_path / "splits"), "test", key="data.heldout")
    with pytest.raises(DataError, match=r"^data\.heldout: .* split 'test' .* cannot be loaded"):
        read_rows(str(tmp_path / "files"), "test", key="data.heldout")


def test_unknown_hub_name(hub_cache: None) -> None:
    with pytest.raises(DataError, match=r"^data\.train: 'nobody/nothing' is no file here"):
        read_rows("nobody/nothing", "train")
