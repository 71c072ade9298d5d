"""Weights of few bits: the grid is compressed-tensors', the gradient goes straight through, files say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gkd.cli.export import export_command
from gkd.config import QuantizeConfig
from gkd.errors import CheckpointError, ConfigError, InputError, ModelError
from gkd.evaluate.sizes import stored_parameters, weight_file_bytes
from gkd.models import (
    ModelCard,
    Probe,
    Quantization,
    check_covers,
    empty_model,
    load_causal_lm,
    quantization_targets,
    quantize_linear,
    read_config,
    save_final,
    weight_scales,
    whole_weights,
)
from gkd.models.leaving import LeavingWeight
from gkd.models.quantized_files import packed_tensors
from gkd.models.unpacked import is_packed, unpacked
from gkd.models.weights import write_weights
from gkd.run_files import RunFiles

INT4 = QuantizeConfig.model_validate({"scheme": "int4", "group_size": 32})
IDS = torch.arange(3, 40)[None]
CARD = ModelCard(
    teacher="t", student="s", objective={}, objective_text="", mixture={}, data="", steps=1, versions={}, heldout={}
)


def matrix(rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[2, 32:64] = 0.0  # a group without a scale of its own
    weight[3] *= 1e-20
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grid_is_that_of_compressed_tensors(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Bit for bit, where it takes the same scales; and each number is at most half a step from what it stands for, or
    the one step that a symmetric grid lacks at its upper end."""
    weight, own = matrix(), Quantization(bits, group_size, dtype)
    args = QuantizationArgs.model_validate(
        {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    )
    groups = weight.unflatten(-1, (-1, group_size))
    scales, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if dtype == torch.float32:
        assert own.scales(weight).equal(scales)
    rounded = own.rounded(weight)
    assert rounded.equal(fake_quantize(weight, own.scales(weight), zero, args))
    steps = own.scales(weight).repeat_interleave(group_size, 1)
    assert ((rounded - weight).abs() <= (0.5 + 0.01 * 2**bits) * steps).all()
    assert own.rounded(rounded.to(torch.float64)).shape == weight.shape


def straight_through(hidden: Tensor, weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W_q^T and the gradients of sum(y^2) / 2, where that of W is taken for W_q's: written out, in float64.

    A group's largest number lies half way between two whole ones, so which it is is decided in float32.
    """
    most = 2 ** (bits - 1)
    rounded = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size]
            scale = float(group.abs().max().float() / ((2**bits - 1) / 2)) or 1.0
            whole = [max(-most, min(most - 1, round(float(number.float() / scale)))) for number in group]
            rounded[row, start : start + group_size] = torch.tensor(whole, dtype=torch.float64) * scale
    out = hidden @ rounded.T
    return out, out @ rounded, out.T @ hidden


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_goes_straight_through(bits: int) -> None:
    module = nn.Linear(96, 24, bias=False)
    holder = nn.Module()
    holder.inner = module
    with torch.no_grad():
        module.weight.copy_(matrix())
    quantize_linear(holder, ["inner"], Quantization(bits, 32, torch.float32))
    hidden = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = module(hidden)
    (out**2).sum().div(2).backward()
    wanted = straight_through(hidden.detach().double(), module.weight.detach().double(), bits, 32)
    assert module.weight.grad is not None and hidden.grad is not None
    for found, expected in zip((out.detach(), hidden.grad, module.weight.grad), wanted, strict=True):
        assert torch.linalg.norm(found.double() - expected) <= 1e-6 * torch.linalg.norm(expected)
    assert not torch.allclose(out, torch.nn.functional.linear(hidden, module.weight), atol=1e-3)


def made(folder: Path, quantize: QuantizeConfig = INT4, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = load_causal_lm(str(folder), "float32")
    quantize_linear(model, quantization_targets(model, quantize), Quantization.of(quantize, dtype))
    return model


def values(weights: dict[str, LeavingWeight]) -> dict[str, Tensor]:
    return {name: one.value(*(p.detach() for p in one.parameters)) for name, one in weights.items()}


def saved(model: Any, source: Path, target: Path, dtype: str, quantize: QuantizeConfig = INT4) -> Path:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(IDS).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, IDS[0, 1:, None])[:, 0]
    return save_final(
        target,
        values(whole_weights(model)).items(),
        source,
        dtype,
        CARD,
        probe=Probe(IDS[0].tolist(), logprobs.tolist(), 1e-5 if dtype == "float32" else 0.1),
        quantization=Quantization.of(quantize, getattr(torch, dtype)),
        scales=values(weight_scales(model)).items(),
    )


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # transformers', to whom it is passed
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("student", ["tiny_student", "tiny_untied_student"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_what_loads(
    scheme: str, student: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Packed, by gkd and by transformers alone; 4 bits a weight and a scale a group."""
    source, quantize = request.getfixturevalue(student), INT4.model_copy(update={"scheme": scheme})
    model = made(source, quantize, getattr(torch, dtype))
    folder = saved(model, source, tmp_path / "final", dtype, quantize)
    loaded = load_causal_lm(str(folder), dtype, may_be_packed=True)
    trained = values(whole_weights(model))
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(trained[name].to(parameter.dtype)), name
    if dtype == "float32":
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and "lm_head" in config["ignore"]
    files = load_file(folder / "model.safetensors")
    packed = next(tensor for name, tensor in files.items() if name.endswith("gate_proj.weight_packed"))
    assert packed.dtype == torch.int32 and packed.shape == (128, 64 // (32 // quantize.bits))
    check_covers(str(folder), key="teacher.model", may_be_packed=True)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    theirs: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert dict(theirs.named_parameters())["model.layers.0.mlp.gate_proj.weight"].equal(
        loaded.get_parameter("model.layers.0.mlp.gate_proj.weight")
    )


def test_what_is_quantized_and_what_is_not(tiny_student: Path) -> None:
    model = empty_model(read_config(str(tiny_student)))
    names = quantization_targets(model, INT4)
    kinds = {name.rpartition(".")[2] for name in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    fewer = quantization_targets(
        model, INT4.model_copy(update={"ignore": ["lm_head", "down_proj", "layers.0.mlp.up_proj"]})
    )
    assert len(names) - len(fewer) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"group_size": 48}, r"^student\.quantize\.group_size: 64 columns of .* groups of 48; sizes .*: 16, 32, 64$"),
        (
            {"ignore": ["nose_proj"]},
            r"^student\.quantize\.ignore: LlamaForCausalLM has no .*'nose_proj'; known: .*q_proj",
        ),
        (
            {"ignore": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
            "every linear module",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tiny_student: Path, change: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        quantization_targets(empty_model(read_config(str(tiny_student))), INT4.model_copy(update=change))


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^student\.quantize: .*experts.*are fused experts"):
        quantization_targets(empty_model(config), INT4)


def test_packed_files_are_read_where_they_may_be(tmp_path: Path, tiny_student: Path) -> None:
    folder = saved(made(tiny_student), tiny_student, tmp_path / "final", "float32")
    with pytest.raises(
        ModelError, match=r"^student\.model: .*is quantized; what is trained or cut needs plain weights"
    ):
        load_causal_lm(str(folder), "float32")
    with pytest.raises(ModelError, match=r"^student\.model: .*is quantized"):
        check_covers(str(folder), key="student.model")
    files = load_file(folder / "model.safetensors")
    del files["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(files, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"^key: .*model\.layers\.0\.mlp\.up_proj lacks one of weight_packed"):
        load_causal_lm(str(folder), "float32", key="key", may_be_packed=True)
    config = json.loads((folder / "config.json").read_text())
    for change, error in (
        ({"format": "float-quantized"}, r"is quantized \(compressed-tensors\); gkd reads plain weights and those that"),
        ({"quant_method": "gptq"}, r"is quantized \(gptq\); gkd reads"),
        ({"config_groups": {"a": {"targets": "Linear"}}}, r"is not compressed-tensors'"),
        (
            {"transform_config": {"config_groups": {}, "rotated": 1}},
            r"the transform_config of its config\.json is not read",
        ),
    ):
        changed = {**config, "quantization_config": config["quantization_config"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=error):
            check_covers(str(folder), key="teacher.model", may_be_packed=True)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # transformers', to whom it is passed
def test_columns_in_another_order_are_read_as_transformers_reads_them(tmp_path: Path, tiny_student: Path) -> None:
    folder = saved(made(tiny_student), tiny_student, tmp_path / "final", "float32")
    before = load_causal_lm(str(folder), "float32", may_be_packed=True)
    files, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in files if name.endswith("weight_packed")]:
        columns = 8 * files[name].shape[1]
        order = torch.randperm(columns, generator=draw) // 32
        files[name.replace("weight_packed", "weight_g_idx")] = order.to(torch.int32)
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (folder / "config.json").write_text(json.dumps(config))
    check_covers(str(folder), key="teacher.model", may_be_packed=True)
    assert stored_parameters(folder) == stored_parameters(tiny_student)
    loaded = load_causal_lm(str(folder), "float32", may_be_packed=True)
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    dequantized = CompressedTensorsConfig(dequantize=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dequantized)
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(of_theirs[name]), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not loaded.get_parameter(name).equal(before.get_parameter(name))


def test_parts_of_a_weight_may_lie_in_several_files(tmp_path: Path, tiny_student: Path) -> None:
    folder = saved(made(tiny_student), tiny_student, tmp_path / "final", "float32")
    expected = load_causal_lm(str(folder), "float32", may_be_packed=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_weights(folder, sorted(tensors.items(), key=lambda one: one[0][::-1]), max_shard_bytes=4096)
    assert len(list(folder.glob("*.safetensors"))) > 3
    loaded = load_causal_lm(str(folder), "float32", may_be_packed=True)
    assert all(parameter.equal(expected.get_parameter(name)) for name, parameter in loaded.named_parameters())


def test_a_packed_model_that_loads_as_something_else_is_not_left_behind(
    tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed(tensors: Any, scales: Any, quantization: Quantization) -> Any:
        return packed_tensors(tensors, {name: 1.05 * scale for name, scale in scales.items()}, quantization)

    monkeypatch.setattr("gkd.models.repacked.packed_tensors", skewed)
    with pytest.raises(CheckpointError, match=r"^MODEL: .*does not load as it was rounded"):
        export_command(str(tiny_student), tmp_path / "packed", "compressed-tensors", "int4", 32, None)
    assert list(tmp_path.iterdir()) == []


def test_files_with_other_names_are_not_packed_in_silence(tmp_path: Path, tiny_student: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(tiny_student, folder)
    tensors = {name.removeprefix("model."): one for name, one in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^MODEL: .*its files have no model\.layers\.0\.mlp\.down_proj\.weight"):
        export_command(str(folder), tmp_path / "packed", "compressed-tensors", "int4", 32, None)
    assert not (tmp_path / "packed").exists()


def test_an_unpacked_copy_is_kept(tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    model = made(tiny_student, dtype=torch.bfloat16)
    folder = saved(model, tiny_student, tmp_path / "final", "bfloat16")
    assert is_packed(str(folder), key="key") and not is_packed(str(tiny_student), key="key")
    plain = unpacked(str(folder), key="key")
    assert unpacked(str(folder), key="key") == plain and not is_packed(plain, key="key")
    assert (Path(plain) / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    expected = dict(load_causal_lm(str(folder), "bfloat16", may_be_packed=True).named_parameters())
    for name, parameter in load_causal_lm(plain, "bfloat16").named_parameters():
        assert parameter.equal(expected[name]), name


@pytest.mark.parametrize("student", ["tiny_student", "tiny_untied_student"])
def test_a_finished_model_is_packed_and_unpacked(student: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By the command. It is what a student that is trained so would have begun as."""
    source = request.getfixturevalue(student)
    files, there, back = RunFiles(tmp_path / "run"), tmp_path / "packed", tmp_path / "plain"
    shutil.copytree(source, files.final)
    export_command(str(files.path), there, "compressed-tensors", "int4", 32, None)
    trained = values(whole_weights(made(source)))
    loaded = load_causal_lm(str(there), "float32", may_be_packed=True)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(trained[name]), name
    assert stored_parameters(there) == stored_parameters(source)
    assert weight_file_bytes(there) < weight_file_bytes(source)
    export_command(str(there), back, "plain")
    for name, parameter in load_causal_lm(str(back), "float32").named_parameters():
        assert parameter.equal(trained[name]), name
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((str(source), back, "plain"), r"^--out: .* exists"),
        ((str(source), tmp_path / "new", "plain"), r"^--format: .* is plain already"),
        ((str(there), tmp_path / "new", "compressed-tensors"), r"^--format: .* is packed already"),
        ((str(source), tmp_path / "new", "compressed-tensors", "int4", 48), r"^--group-size: 64 columns of "),
        ((str(source), tmp_path / "new", "compressed-tensors", "int4", 32, ["nose_proj"]), r"^--ignore: .*'nose_proj'"),
    ]
    for arguments, error in cases:
        with pytest.raises(InputError, match=error):
            export_command(*arguments)
    assert not (tmp_path / "new").exists()


def test_a_result_that_is_not_what_was_trained_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    """Scales that the weights were not rounded by."""
    model = made(tiny_student)
    scales = {name: 1.05 * tensor for name, tensor in values(weight_scales(model)).items()}
    with pytest.raises(CheckpointError, match="does not load as it was trained"):
        save_final(
            tmp_path / "final",
            values(whole_weights(model)).items(),
            tiny_student,
            "float32",
            CARD,
            probe=Probe([3, 4], [0.0], 1e9),
            quantization=Quantization.of(INT4, torch.float32),
            scales=scales.items(),
        )
