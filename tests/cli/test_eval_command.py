"""gkd eval as a user calls it, on a run folder of tiny models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import check, run_gkd
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.config import load_config
from gkd.errors import InputError
from gkd.evaluate.evaluation import evaluate
from gkd.evaluate.figures import COLUMNS, Evaluation

HELDOUT = [("how are you", "I am well, and you?"), ("name a colour", "blue"), ("again", "and again")]
TASK_KEYS = {
    "forward_kl", "reverse_kl", "jsd", "top1_agreement", "perplexity", "rouge_l", "accuracy_chain_sum",
}  # fmt: skip


def write_rows(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    lines = []
    for question, answer in rows:
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
        if answer is not None:
            row["completion"] = [{"role": "assistant", "content": answer}]
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A config whose run folder is `folder`/run; nothing of it exists yet."""
    data = folder / "heldout.jsonl"
    if not data.exists():
        write_rows(data, list(HELDOUT))
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "seed": 3},
        "data": {"train": "not-needed.jsonl", "heldout": str(data), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 12},
        "eval": {"resamples": 200, "engines": ["transformers"], "timing_repeats": 2, "timing_batch_size": 2},
    }
    for section, keys in sections.items():
        values.setdefault(section, {}).update(keys)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def models(tiny_teacher: Path, tiny_student: Path) -> dict[str, dict[str, Any]]:
    return {
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"model": str(tiny_student), "dtype": "float32"},
    }


@pytest.fixture(scope="module")
def no_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For PYTHONPATH: with it `import vllm` fails as where vLLM is not installed."""
    folder = tmp_path_factory.mktemp("no_vllm")
    (folder / "vllm.py").write_text("raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')\n")
    return folder


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path, no_vllm: Path
) -> tuple[Path, dict[str, Any]]:
    """(folder, printed JSON) of a run whose result is the teacher itself, where vLLM is not installed."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_config(
        folder,
        teacher={"model": str(tiny_teacher), "dtype": "float32"},
        student={"model": str(tiny_student), "dtype": "float32"},
        eval={"tasks": ["chain_sum"], "task_problems": 3, "engines": ["vllm", "transformers"]},
    )
    shutil.copytree(tiny_teacher, folder / "run" / "final")
    extra = {"GKD_CACHE": str(folder / "cache"), "PYTHONPATH": str(no_vllm)}
    result = check(run_gkd(["eval", config, "--format", "json"], **extra))  # pyright: ignore[reportArgumentType]
    return folder, json.loads(result.stdout)


@torch.no_grad()
def float64_perplexity(folder: Path) -> float:
    """Of HELDOUT's answers, end token included, with plain transformers, one row at a time."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        AutoTokenizer.from_pretrained(folder),
    )
    total, tokens = 0.0, 0
    for question, answer in HELDOUT:
        prompt = f"<|start|>user\n{question}<|end|>\n<|start|>assistant\n"
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt}{answer}<|end|>")["input_ids"]])
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= float(logprobs.gather(-1, ids[0, start:, None]).sum())
        tokens += ids.shape[1] - start
    return math.exp(total / tokens)


@pytest.mark.slow
def test_one_object_is_printed_and_written(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = evaluated
    assert json.loads((folder / "run" / "eval.json").read_text()) == printed
    assert Evaluation.from_json(printed).as_json() == printed
    assert printed["task"]["figures"].keys() == TASK_KEYS
    assert list(printed["models"]) == list(COLUMNS) and printed["models"]["student_after"].endswith("run/final")
    table = [line for line in (folder / "run" / "eval.md").read_text().splitlines() if line.startswith("|")]
    assert table[0] == "|  | teacher | student before | student after |"
    assert {line.count("|") for line in table} == {5}


@pytest.mark.slow
def test_a_student_that_is_the_teacher(evaluated: tuple[Path, dict[str, Any]], tiny_teacher: Path) -> None:
    figures = evaluated[1]["task"]["figures"]
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert figures[name]["student_after"]["value"] == pytest.approx(0, abs=1e-6)
        assert figures[name]["student_before"]["low"] > 0.01, "the other student differs"
    assert figures["top1_agreement"]["student_after"]["value"] == 1
    for name in ("perplexity", "rouge_l", "accuracy_chain_sum"):
        assert figures[name]["student_after"] == pytest.approx(figures[name]["teacher"], rel=1e-6)


@pytest.mark.slow
def test_perplexity_of_the_references(
    evaluated: tuple[Path, dict[str, Any]], tiny_teacher: Path, tiny_student: Path
) -> None:
    perplexity = evaluated[1]["task"]["figures"]["perplexity"]
    assert perplexity["source"].startswith("completions of data.heldout: 3 prompts")
    assert perplexity["teacher"]["value"] == pytest.approx(float64_perplexity(tiny_teacher), rel=1e-5)
    assert perplexity["student_before"]["value"] == pytest.approx(float64_perplexity(tiny_student), rel=1e-5)


@pytest.mark.slow
def test_an_engine_that_is_missing_is_said_and_the_other_measured(evaluated: tuple[Path, dict[str, Any]]) -> None:
    figures = evaluated[1]["efficiency"]["figures"]
    for column in COLUMNS:
        for name in ("first_token_ms", "tokens_per_s", "peak_memory_bytes"):
            assert figures[f"transformers_{name}"][column]["value"] > 0
            assert "vLLM cannot be imported" in figures[f"vllm_{name}"][column]["not_measured"]
        first_token = figures["transformers_first_token_ms"][column]
        assert first_token["low"] <= first_token["value"] <= first_token["high"]
        assert figures["parameters"][column]["value"] > figures["non_embedding_parameters"][column]["value"] > 0
        assert figures["flops_a_token"][column]["value"] > 0
    notes = (evaluated[0] / "run" / "eval.md").read_text()
    assert "vLLM cannot be imported" in notes and "| first token, vllm, ms | not measured | not measured |" in notes


@pytest.mark.slow
def test_a_second_call_gives_the_same_task_figures_from_nothing(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """With an empty cache, so that everything is sampled again."""
    folder, printed = evaluated
    again = check(
        run_gkd(
            ["eval", folder / "run.yaml", "--only", "task", "--format", "json", "--out", folder / "elsewhere"],
            GKD_CACHE=str(folder / "other_cache"),
        )
    )
    assert json.loads(again.stdout)["task"] == printed["task"]
    assert (folder / "elsewhere" / "eval.md").is_file()


def test_a_failing_axis_does_not_lose_the_other(
    tmp_path: Path, models: dict[str, Any], tiny_student: Path, no_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling with vLLM where there is none."""
    monkeypatch.setenv("PYTHONPATH", str(no_vllm))
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    config = load_config(write_config(tmp_path, rollout={"engine": "vllm"}, **models))
    evaluation = evaluate(config, student=str(tiny_student), axes=("compression", "task"))
    reason = evaluation.axes["task"].not_measured
    assert reason is not None and reason.startswith("ModelError: rollout.engine: vLLM cannot be imported")
    assert len(evaluation.axes["compression"].rows) == 4 and not evaluation.is_empty


def test_nothing_measured_is_shown_and_ends_with_1(
    tmp_path: Path, models: dict[str, Any], tiny_student: Path, no_vllm: Path
) -> None:
    config = write_config(tmp_path, rollout={"engine": "vllm"}, **models)
    arguments = ["eval", config, "--student", tiny_student, "--only", "task", "--out", tmp_path / "out"]
    result = run_gkd(arguments, GKD_CACHE=str(tmp_path / "cache"), PYTHONPATH=str(no_vllm))
    assert result.returncode == 1 and "gkd eval: nothing could be measured" in result.stderr, result.stderr
    assert "student before" in result.stdout and "task not measured: ModelError" in result.stdout
    assert list(json.loads((tmp_path / "out" / "eval.json").read_text())["task"]) == ["not_measured"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tasks"], "--only: unknown axis 'tasks'; known: task, efficiency, compression"),
        (["--out", "run.yaml"], "--out: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, models: dict[str, Any], arguments: list[str], message: str
) -> None:
    config = write_config(tmp_path, **models)
    result = run_gkd(["eval", config, *arguments], cwd=tmp_path, GKD_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("gkd: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("student", "override", "message"),
    [
        ("STUDENT", "data.heldout=null", r"^data\.heldout: the task axis of gkd eval needs held-out data.*--only"),
        ("STUDENT", "data.heldout=nowhere.jsonl", r"^data\.heldout"),
        ("STUDENT", "eval.tasks=[chain_sums]", r"^eval\.tasks: .*did you mean chain_sum\?"),
        ("./no/such/student", "run.seed=1", r"^--student: there is no folder"),
        ("OTHER_TOKENS", "run.seed=1", r"token"),
        (None, "run.seed=1", r"^run\.dir: .*run gkd train first, or give --student"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(
    tmp_path: Path,
    models: dict[str, Any],
    tiny_student: Path,
    student: str | None,
    override: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    if student == "OTHER_TOKENS":
        student = str(with_other_tokens(tiny_student, tmp_path / "other"))
    elif student == "STUDENT":
        student = str(tiny_student)
    config = load_config(write_config(tmp_path, **models), [override])
    with pytest.raises(InputError, match=message) as refused:
        evaluate(config, student=student)
    assert refused.value.exit_code == 2 and not (tmp_path / "cache").exists()


def with_other_tokens(model: Path, target: Path) -> Path:
    """The same model with two tokens' ids exchanged."""
    shutil.copytree(model, target)
    file = target / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(values))
    return target
