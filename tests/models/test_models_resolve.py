"""From a config's model name to a folder or hub name; fingerprints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_model

from gkd import digests
from gkd.errors import ModelError
from gkd.models import local_folder, model_fingerprint, resolve_model
from gkd.models.weight_files import SINGLE_FILE


def _refusal(name: str, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(name, key="student.model", **options)
    assert str(caught.value).startswith("student.model: ")
    return str(caught.value)


def test_a_folder_becomes_absolute(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny_student)) == str(tiny_student)
    monkeypatch.chdir(tiny_student.parent)
    assert resolve_model("student") == str(tiny_student)
    assert resolve_model("./student") == str(tiny_student)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/a_b.c-d"])
def test_a_hub_name_stays(name: str) -> None:
    assert resolve_model(name, revision="main") == name


@pytest.mark.parametrize("name", ["", "./none", "/no/such/folder", "a/b/c", "../x/y", "~/none", "a b", "-a/b"])
def test_neither_folder_nor_hub_name(name: str) -> None:
    assert "there is no folder" in _refusal(name)


def test_a_file_is_not_a_model(tiny_student: Path) -> None:
    assert "is a file" in _refusal(str(tiny_student / "config.json"))


def test_a_folder_has_no_revision(tiny_student: Path) -> None:
    assert "has no revision 'main'" in _refusal(str(tiny_student), revision="main")


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in _refusal(str(tmp_path))


def test_a_hub_out_of_reach() -> None:
    with pytest.raises(ModelError, match=r"^teacher\.model: there is no folder 'nobody/nothing' here, it is not in"):
        local_folder("nobody/nothing")


def test_the_fingerprint_changes_with_what_the_model_is(tiny_student: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_student, tmp_path / "model"))
    first = model_fingerprint(model)
    assert first == model_fingerprint(str(tiny_student))
    assert len(first) == 16
    (model / "README.md").write_text("not part of it")
    assert model_fingerprint(model) == first
    seen = {first}
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text((model / name).read_text() + "\n")
        seen.add(model_fingerprint(model))
    content = bytearray((model / SINGLE_FILE).read_bytes())
    for place in (len(content) // 3, len(content) // 2, -1):
        content[place] ^= 1
        (model / SINGLE_FILE).write_bytes(content)
        seen.add(model_fingerprint(model))
    assert len(seen) == 6


def test_a_fingerprint_is_of_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in the middle of a file of several MiB, the file's length, times and place kept."""
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_AFTER_S", -1.0)  # as if both had lain here for long
    model = save_tiny_model(tmp_path / "model", layers=12, hidden=256)
    file = model / SINGLE_FILE
    assert file.stat().st_size > 16 << 20
    first = model_fingerprint(model)
    middle = file.stat()
    with file.open("r+b") as stream:
        stream.seek(middle.st_size // 2)
        stream.write(b"x")
    os.utime(file, ns=(middle.st_atime_ns, middle.st_mtime_ns))
    assert model_fingerprint(model) != first


def test_a_weight_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", layers=4, hidden=128)
    reads: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first and len(reads) == 2, "just written, it may change unseen by the clock"
    monkeypatch.setattr(digests, "_SETTLED_AFTER_S", -1.0)
    assert [model_fingerprint(model) for _ in range(3)] == [first] * 3 and len(reads) == 3
    for record in (tmp_path / "cache" / "digests").iterdir():
        record.write_text("{")
    assert model_fingerprint(model) == first and len(reads) == 4


def test_the_room_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, gkd.models, gkd.models.resolve, gkd.models.wheel, gkd.models.tokenizer_pair;"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import gkd.models

    for name in gkd.models.__all__:
        assert callable(getattr(gkd.models, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        gkd.models.no_such_name  # noqa: B018
