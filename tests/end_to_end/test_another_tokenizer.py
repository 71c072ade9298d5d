"""Runs whose teacher has another tokenizer, or the same one through the same path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_runs import Bare, StopsInTheMiddle, ran, without_times
from launching import MakeConfig, check, read_metrics, run_gkd
from other_tokenizers import LINES, save_other_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.config import load_config
from gkd.errors import ConfigError, TokenizerMismatchError
from gkd.evaluate.evaluation import evaluate
from gkd.evaluate.figures import Cell, Figure
from gkd.train.distiller import Distiller

HERE = pytest.mark.usefixtures("sampling_here")
SMALL = ["eval={prompts: 2, samples: 1, every: 1}", "run.steps=2", "optim.batch_size=4", "optim.micro_batch_size=2"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other_model(tmp_path_factory.mktemp("other") / "teacher", layers=2, hidden=128)


@pytest.fixture(scope="module")
def raw_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The other teacher has no chat template."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("train", "heldout"):
        rows = [{"prompt": line[:12], "completion": line[12:30]} for line in LINES[:6]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "heldout")}


def aligned(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"model": str(folder), "dtype": "float32", "alignment": "shared", "min_shared_mass": 0.1, **keys}


@HERE
@pytest.mark.parametrize("optim", [{}, {"micro_batch_tokens": 120}])
def test_the_same_tokenizer_through_this_path_is_the_ordinary_run(
    make_run_config: MakeConfig, tiny_teacher: Path, optim: dict[str, int]
) -> None:
    texts = {"mixture": {"student": 0.5, "teacher": 0.25, "dataset": 0.25}, "optim": optim}
    objective = {"objective": {"terms": [{"kind": "jsd"}, {"kind": "cross_entropy", "on": ["dataset"]}]}}
    one = make_run_config("ordinary", **texts, **objective)
    other = make_run_config("aligned", **texts, **objective, teacher=aligned(tiny_teacher))
    plain, weights = ran(Bare, load_config(one, SMALL))
    found, aligned_weights = ran(Bare, load_config(other, SMALL))
    for ours, theirs in zip(found, plain, strict=True):
        for name in ("loss", "grad_norm", "objective/jsd/loss", "objective/cross_entropy/loss", "tokens/scored"):
            assert (name in ours) == (name in theirs)
            assert name not in ours or ours[name] == pytest.approx(theirs[name], rel=2e-5), name
        for name in ("divergence/forward_kl", "divergence/reverse_kl", "heldout/jsd", "heldout/forward_kl"):
            place, kind = name.split("/")
            assert (f"{place}/aligned_{kind}" in ours) == (name in theirs)
            assert name not in theirs or ours[f"{place}/aligned_{kind}"] == pytest.approx(theirs[name], rel=2e-5), name
        assert ours["agreement/aligned_top1"] == pytest.approx(theirs["agreement/top1"])
    assert "heldout/jsd" in plain[0]
    for name, tensor in weights.items():
        assert (tensor - aligned_weights[name]).norm() <= 1e-3 * tensor.norm(), name


@HERE
@pytest.mark.parametrize(
    "sections",
    [
        {"mixture": {"student": 0.5, "teacher": 0.25, "dataset": 0.25}, "optim": {"micro_batch_tokens": 120}},
        {"objective": {"kind": "reverse_kl", "temperature": 2.0}, "teacher": {"cache_gib": 0.1}},
        {"teacher": {"alignment": "projection"}},
        {"objective": {"kind": "tvd", "weight": 2.0}, "teacher": {"alignment": "uld"}},
    ],
    ids=["packed", "cached", "projection", "uld"],
)
def test_a_resume_is_bitwise(
    make_run_config: MakeConfig, other: Path, raw_text: dict[str, str], sections: dict[str, Any]
) -> None:
    keys = {
        "data": raw_text,
        "rollout": {"max_new_tokens": 48},
        **sections,
        "teacher": aligned(other, **sections.get("teacher", {})),
    }
    options = [*SMALL, "run.save_every=1"]
    whole, weights = ran(Bare, load_config(make_run_config("whole", **keys), options))
    halves = load_config(make_run_config("halves", **keys), options)
    first, _ = ran(StopsInTheMiddle, halves)
    second, resumed = ran(Bare, halves, resume=True)
    assert without_times([*first, *second]) == without_times(whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items()) and weights
    is_ranked = keys["teacher"]["alignment"] == "uld"
    assert ("divergence/aligned_forward_kl" in whole[0]) != is_ranked and "divergence/forward_kl" not in whole[0]
    assert whole[0]["heldout/aligned_jsd"] > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"alignment": "shared", "placement": "topk", "addresses": ["http://x:1"]}}, "not a top k"),
        ({"teacher": {"alignment": "shared", "model": "student"}}, "the student's tokenizer is its own"),
        ({"teacher": {"min_shared_mass": 0.1}}, "set alignment, or leave it out"),
        ({"teacher": {"max_completion_tokens": 9}}, "set alignment, or leave it out"),
        ({"teacher": {"alignment": "shared"},
          "mixture": {"student": 0.5, "mixed": 0.5, "teacher": 0.0, "dataset": 0.0}},
         r"mixture\.mixed: .* teacher\.alignment says"),
        ({"teacher": {"alignment": "shared"}, "objective": {"terms": [{"kind": "hidden_states"}]}},
         r"objective\.terms\.0: hidden_states .*teacher\.alignment"),
        ({"teacher": {"alignment": "uld"}, "objective": {"kind": "jsd"}}, r"objective\.kind: jsd .* set it to tvd"),
        ({"teacher": {"alignment": "shared"}, "environment": {"kind": "calculator"}}, "environment: a conversation"),
        ({"teacher": {"alignment": "shared"}, "objective": {"terms": [{"kind": "rkd"}]}}, r"objective\.terms\.0: rkd"),
        ({"teacher": {"alignment": "shared"}, "mixture": {"student": 1.0, "teacher": 0.0, "dataset": 0.0},
          "objective": {"terms": [{"kind": "policy_gradient", "advantage": "teacher"}]}},
         r"objective\.terms\.0: policy_gradient"),
        ({"teacher": {"alignment": "shared"},
          "objective": {"kind": "jsd", "token_weight": {"divergence": {"threshold": 0.1}}}},
         r"objective\.token_weight\.divergence: needs what the teacher says"),
    ],
)  # fmt: skip
def test_what_another_tokenizer_cannot_serve_is_refused(
    make_run_config: MakeConfig, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(make_run_config(**sections))


def test_a_dry_run_shows_what_both_have_in_common_and_refuses_too_little(
    make_run_config: MakeConfig, other: Path, raw_text: dict[str, str]
) -> None:
    path = make_run_config(data=raw_text, teacher=aligned(other))
    lines = Distiller(path).check()
    (line,) = (line for line in lines if line.startswith("teacher.alignment: shared: "))
    assert "257 ids are the same to both tokenizers" in line and "of 12 texts" in line
    with pytest.raises(ConfigError, match=r"^teacher\.min_shared_mass: 0\.\d+ is below 0\.9: 257 ids are the same"):
        Distiller(load_config(path, ["teacher.min_shared_mass=0.9"])).check()
    with pytest.raises(TokenizerMismatchError, match=r"Set teacher\.alignment: shared"):
        Distiller(load_config(path, ["teacher.alignment=null", "teacher.min_shared_mass=0.5"])).check()


def figure_of(cell: Cell) -> float:
    assert isinstance(cell, Figure)
    return cell.value


def taught_on_the_spot(folder: Path) -> Path:
    """A teacher that knows a few lines by heart."""
    save_other_model(folder, layers=2, hidden=64)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [[*tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in LINES[:3]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = torch.stack([model(torch.tensor([own]), labels=torch.tensor([own])).loss for own in ids]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_student_learns_from_it(make_run_config: MakeConfig, tmp_path: Path, raw_text: dict[str, str]) -> None:
    """On texts of the teacher that are not trained on, and on its own samples."""
    teacher = taught_on_the_spot(tmp_path / "teacher")
    path = make_run_config(
        "learns",
        run={"steps": 60},
        teacher=aligned(teacher),
        data=raw_text,
        rollout={"max_new_tokens": 40},
        mixture={"student": 0.5, "teacher": 0.5, "dataset": 0.0},
        optim={"lr": 3e-3, "batch_size": 6, "micro_batch_size": 6},
        eval={"prompts": 6, "samples": 1},
    )
    check(run_gkd(["train", path]))
    evaluated = evaluate(load_config(path), axes=["task"]).axes["task"]
    assert evaluated.not_measured is None, evaluated.not_measured
    (agreed,) = (row for row in evaluated.rows if row.name == "top1_agreement")
    before, after = (figure_of(agreed.cells[column]) for column in ("student_before", "student_after"))
    assert after > before + 0.2, "held-out agreement"
    summary = json.loads((tmp_path / "learns" / "summary.json").read_text())
    before, after = (summary[f"heldout_aligned_jsd_{moment}"] for moment in ("before", "after"))
    assert after < 0.5 * before
    agreement = [record["agreement/aligned_top1"] for record in read_metrics(tmp_path / "learns")]
    assert sum(agreement[-5:]) > sum(agreement[:5]) + 1.0
