"""Loading: safetensors only, no remote code, nothing made up, errors of one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import claim_tied, rewrite_tensor, save_tiny_model
from transformers import GenerationConfig

from gkd.errors import ModelError
from gkd.models import (
    end_token_ids,
    load_causal_lm,
    load_tokenizer,
    owns_head,
    pad_token_id,
    read_config,
    read_generation_config,
)
from gkd.models.weight_files import SINGLE_FILE
from gkd.models.weights import read_tensors, write_weights


@pytest.fixture
def model_folder(tiny_student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_student, tmp_path / "model"))


def _edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _refusal(folder: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load_causal_lm(str(folder), "float32", key="student.model")
    message = str(caught.value)
    assert message.startswith("student.model: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_has_the_dtype(tiny_student: Path, dtype: str, capfd: pytest.CaptureFixture) -> None:
    model = load_causal_lm(str(tiny_student), dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {
        f"torch.{dtype}".replace("torch.torch", "torch")
    }
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert capfd.readouterr().err == ""  # no bars


def test_a_missing_tensor_is_not_made_up(model_folder: Path) -> None:
    kept = [(name, tensor) for name, tensor in read_tensors(model_folder, "") if "layers.1.mlp.up_proj" not in name]
    (model_folder / SINGLE_FILE).unlink()
    write_weights(model_folder, kept)
    assert "lack 1 tensors of LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight" in _refusal(model_folder)


def test_weights_of_another_shape(model_folder: Path) -> None:
    _edit_config(model_folder, intermediate_size=64)
    assert "cannot load the model" in _refusal(model_folder)


def test_an_unknown_architecture(model_folder: Path) -> None:
    _edit_config(model_folder, model_type="no_such_architecture")
    assert "no_such_architecture" in _refusal(model_folder)


@pytest.mark.fault
def test_code_of_a_model_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (model_folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    _edit_config(model_folder, auto_map=remote, model_type="evil")
    assert "needs program code from its own files, which gkd does not run" in _refusal(model_folder)
    _edit_config(model_folder, model_type="llama")
    load_causal_lm(str(model_folder), "float32")  # transformers' own class is there: it is taken
    assert not canary.exists()


@pytest.mark.fault
def test_a_kernel_named_by_a_config_is_not_fetched(model_folder: Path) -> None:
    _edit_config(model_folder, _attn_implementation="nobody/evil-kernel", attn_implementation="nobody/evil-kernel")
    assert load_causal_lm(str(model_folder), "float32").config._attn_implementation == "sdpa"


def test_capped_attention_scores_are_capped(tmp_path: Path) -> None:
    """PyTorch's attention would leave them as they are, and say nothing."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0)
    model.save_pretrained(tmp_path)
    ids = torch.randint(50, (1, 12))
    model.set_attn_implementation("eager")
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(load_causal_lm(str(tmp_path), "float32")(input_ids=ids).logits, expected)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-2)


def test_a_quantized_model(model_folder: Path) -> None:
    _edit_config(model_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantized" in _refusal(model_folder)


def test_pickled_weights(model_folder: Path) -> None:
    (model_folder / SINGLE_FILE).rename(model_folder / "pytorch_model.bin")
    assert "convert them to safetensors" in _refusal(model_folder)


def test_an_unknown_hub_name() -> None:
    assert "the hub is out of reach" in _refusal("nobody/nothing")
    with pytest.raises(ModelError, match=r"^teacher\.model: there is no folder 'nobody/nothing' here"):
        read_config("nobody/nothing", key="teacher.model")
    with pytest.raises(ModelError, match=r"^student\.model: "):
        load_tokenizer("nobody/nothing")


def test_no_tokenizer(model_folder: Path) -> None:
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"^student\.model: cannot load the tokenizer of "):
        load_tokenizer(str(model_folder), "student.model")


def test_generation_config_may_be_absent(model_folder: Path) -> None:
    found = read_generation_config(str(model_folder))
    assert found is not None
    assert found.eos_token_id == 2
    (model_folder / "generation_config.json").unlink()
    assert read_generation_config(str(model_folder)) is None


def _tokenizer(eos: int | None, pad: int | None = None) -> Any:
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad)


def test_end_tokens_of_tokenizer_and_configs() -> None:
    assert end_token_ids(_tokenizer(7), GenerationConfig(eos_token_id=[9, 7, 3]), None) == (7, 9, 3)
    assert end_token_ids(_tokenizer(None), GenerationConfig(eos_token_id=0)) == (0,)
    with pytest.raises(ModelError, match=r"^student\.model: neither the tokenizer nor"):
        end_token_ids(_tokenizer(None), GenerationConfig(), None)


def test_pad_is_else_the_end_token() -> None:
    assert pad_token_id(_tokenizer(7, 0)) == 0
    assert pad_token_id(_tokenizer(7)) == 7
    with pytest.raises(ModelError, match="neither a pad token nor an end token"):
        pad_token_id(_tokenizer(None))


def test_the_tiny_tokenizer(tiny_student: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_student))
    assert end_token_ids(tokenizer, read_generation_config(str(tiny_student))) == (2,)
    assert pad_token_id(tokenizer) == 0


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    rewrite_tensor(folder / "model.safetensors", "model.embed_tokens.weight", lambda w: w[250].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"^key: .*: model\.embed_tokens\.weight: row 250 is not finite"):
        load_causal_lm(str(folder), "float32", key="key")


def test_whose_head_is_its_own(tiny_student: Path, tiny_untied_student: Path, tmp_path: Path) -> None:
    """Where transformers goes by the files and vLLM by the config."""
    own = claim_tied(save_tiny_model(tmp_path / "own", tied=False))
    assert owns_head(str(own)) and not owns_head(str(tiny_student)) and not owns_head(str(tiny_untied_student))
    from safetensors.torch import load_file, save_file

    tensors = load_file(own / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, own / "model.safetensors")
    assert not owns_head(str(own))
