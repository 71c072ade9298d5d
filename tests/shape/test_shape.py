"""gkd shape: sizes that could be, what a candidate is worth, and the config that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_prompts, save_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gkd.bench.work import Job
from gkd.cli.shape import shape_command
from gkd.config import load_config, make_config
from gkd.errors import ConfigError, InputError
from gkd.models import empty_model, student_config
from gkd.planning.devices import device_named
from gkd.planning.memory import memory_plan
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.planning.time import time_plan
from gkd.shape import front, search, show
from gkd.shape.candidates import Candidate, candidates_of, families_named, parse_share, spread
from gkd.shape.measured import measure
from gkd.shape.planned import Planner
from gkd.shape.rewritten import write_with
from gkd.shape.search import Asked
from gkd.train.distiller import Distiller

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma": Gemma3TextConfig
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, config: PreTrainedConfig) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return str(folder)


# ---- candidates


@pytest.mark.parametrize(
    "text", ["", "0.1", "0.1-0.5", "0.5..0.1", "0..0.5", "0.1..1", "a..b", "nan..0.5", "0.1..0.2..0.3"]
)
def test_no_range(text: str) -> None:
    with pytest.raises(InputError, match=r"--share: .*e\.g\. 0\.05\.\.0\.5"):
        parse_share(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_student(family: str, tmp_path: Path) -> None:
    """Of what the cut is certain to make: the same config, counted by transformers."""
    source = saved(tmp_path, FAMILIES[family](**SIZES))
    found = candidates_of(source, "both")
    whole: Any = empty_model(student_config(source, None))
    assert found.teacher_parameters == whole.num_parameters() and len({one.name for one in found.all}) == len(found.all)
    assert {(one.heads, one.kv_heads) for one in found.all} == {(8, 4), (6, 3), (4, 2), (2, 1)}
    for one in (found.all[0], found.all[len(found.all) // 2], found.all[-1]):
        student: Any = empty_model(student_config(source, one.init("even", 64)))
        assert student.num_parameters() == one.parameters and one.share == one.parameters / found.teacher_parameters
    assert all(one.share < 1 for one in found.all)


def test_widths_go_with_the_heads_or_shrink_geometrically(tmp_path: Path) -> None:
    source = saved(tmp_path, LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 512}))

    def widths(families: Any) -> set[tuple[int, int, int]]:
        return {(one.hidden, one.heads, one.ffn) for one in candidates_of(source, families).all if one.layers == 5}

    assert widths("heads") == {(192, 6, 384), (128, 4, 256), (64, 2, 128)}
    assert widths("geometric") == {(184, 8, 360), (128, 8, 256), (88, 8, 184), (64, 8, 128)}
    assert widths("none") == set() and {one.layers for one in candidates_of(source, "none").all} == {1, 2, 3, 4}


def test_a_family_that_cannot_be_made_narrower_has_depths_alone(tmp_path: Path) -> None:
    source = saved(tmp_path, GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=259, n_positions=64))
    with pytest.raises(InputError, match=r"only their families can be made narrower.*--widths none"):
        candidates_of(source, "both")
    assert [one.layers for one in candidates_of(source, "none").all] == [1, 2]
    with pytest.raises(InputError, match="--widths: 'all' is none of both, heads, geometric, none"):
        families_named("all")


def test_what_is_out_of_range_names_the_nearest(tiny_teacher: Path) -> None:
    found = candidates_of(str(tiny_teacher), "both")
    with pytest.raises(InputError, match=rf"0\.001 to 0\.002.*nearest is {found.all[0].name} with"):
        found.within((0.001, 0.002))
    with pytest.raises(InputError, match=r"--pick: '9x9x9' is no candidate"):
        found.named("9x9x9")


def test_the_spread_is_far_apart_and_does_not_repeat(tiny_teacher: Path) -> None:
    found = candidates_of(str(tiny_teacher), "both").all
    some = spread(found, 4)
    assert some == sorted(some, key=lambda one: one.parameters) and len({one.name for one in some}) == 4
    assert found[-1] in some and len(spread(found, 99)) == len(found) and spread(found, 0) == []
    assert {one.layers for one in some} > {min(one.layers for one in found)}


# ---- plans


def test_a_plan_is_that_of_the_candidates_config(tiny_teacher: Path, tmp_path: Path) -> None:
    asked = asked_for(tiny_teacher, tmp_path)
    one = next(one for one in candidates_of(asked.source, "both").all if one.layers == 2 and not one.is_whole_width)
    config = load_config(asked.file, [asked.init_override(one)])
    setup = make_setup(config, *architectures(config), device_named("h100"), 1)
    plan = Planner(asked.config, device_named("h100")).plan(one)
    assert plan is not None and setup.student.parameters == one.parameters
    assert (plan.step_s, plan.peak_bytes) == (time_plan(setup).step_s, memory_plan(setup).peak_bytes)
    assert 0 < plan.token_s < plan.step_s


def test_what_is_not_planned_for_is_said(tmp_path: Path) -> None:
    source = saved(tmp_path / "gemma", Gemma3TextConfig(**SIZES))
    planner = Planner(asked_for(Path(source), tmp_path).config, device_named("cpu"))
    assert "gemma3_text" in planner.why_not and planner.plan(candidates_of(source, "both").all[0]) is None


# ---- measuring


def asked_for(
    teacher: Path, folder: Path, *, probe_steps: int = 2, text: str = "", overrides: Sequence[str] = ()
) -> Asked:
    file = folder / "run.yaml"
    train = save_prompts(folder / "train.jsonl", 24)
    file.write_text(
        f"# mine\nteacher: {{model: {teacher}, dtype: float32}}  # the large one\n"
        f"student: {{dtype: float32}}\ndata: {{train: {train}, max_prompt_tokens: 64}}\n"
        "rollout: {engine: transformers, max_new_tokens: 8}\nobjective: {kind: forward_kl}\n"
        "optim: {lr: 1.0e-3, batch_size: 4, micro_batch_size: 2}\n"
    )
    return Asked.read(file, overrides, folder / "shape", probe_steps)


def a_candidate(asked: Asked, *, whole_width: bool = False) -> Candidate:
    found = candidates_of(asked.source, "both").all
    return next(one for one in found if one.layers == 3 and one.is_whole_width == whole_width)


@pytest.mark.parametrize("whole_width", [True, False])
def test_a_probe_that_learns_nothing_is_as_far_as_the_cut(
    tiny_teacher: Path, tmp_path: Path, whole_width: bool
) -> None:
    """So both figures are over the same positions; and one that learns is closer."""
    idle = asked_for(tiny_teacher, tmp_path, overrides=("optim.lr=1e-12",))
    found = measure(idle.run_config(a_candidate(idle, whole_width=whole_width)), 2)
    assert found["after_cut"] > 0.01
    assert found["after_probe"] == pytest.approx(found["after_cut"], rel=1e-5)
    asked = asked_for(tiny_teacher, tmp_path, probe_steps=8)
    learned = measure(asked.run_config(a_candidate(asked, whole_width=whole_width)), 8)
    assert learned["after_cut"] == found["after_cut"] and learned["after_probe"] < 0.95 * learned["after_cut"]


def do(jobs: Sequence[Job]) -> list[str]:
    """As `Workers`, in this process."""
    return [job.work(*job.arguments) for job in jobs if not job.target.exists()]


def test_what_was_measured_is_kept_and_shown(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    asked = asked_for(tiny_teacher, tmp_path)
    monkeypatch.setattr(search, "run_stages", lambda workers, stages: [do(jobs) for jobs in stages])
    shape_command(asked.file, [], "0.1..0.9", "both", 3, 2, "cpu", None, asked.folder, tmp_path / "chosen.yaml")
    record = json.loads((asked.folder / "shape.json").read_text())
    measured = [row for row in record["candidates"] if "after_probe" in row]
    assert len(measured) == 3 < len(record["candidates"]) and not any("failed" in row for row in measured)
    assert record["not_planned"] == "" and all(row["plan"]["token_s"] > 0 for row in record["candidates"])
    table = (asked.folder / "shape.md").read_text()
    assert table.count("\n| ") == 2 + 3 and "suggested" in table and f"{measured[0]['after_probe']:.3f}" in table
    assert (asked.folder / "shape.png").stat().st_size > 1000 and not any((asked.folder / "runs").iterdir())

    chosen = load_config(tmp_path / "chosen.yaml")
    bend = front.knee(front.pareto(record["candidates"]))
    assert bend is not None and chosen.student.init is not None and chosen.student.init.count(4) == bend["layers"]
    assert (tmp_path / "chosen.yaml").read_text().startswith("# mine\nteacher: {model")
    Distiller(chosen).check()

    monkeypatch.setattr("gkd.shape.measured.measure", None)  # nothing is measured again
    name, out = measured[0]["name"], tmp_path / "b.yaml"
    shape_command(asked.file, [], "0.1..0.9", "both", 3, 2, "cpu", name, asked.folder, out)
    picked = load_config(out).student.init
    assert picked is not None and picked.count(4) == measured[0]["layers"]
    assert json.loads((asked.folder / "shape.json").read_text())["candidates"] == record["candidates"]
    assert "b.yaml is written" in capsys.readouterr().out


def test_whatever_decides_a_figure_names_its_file(tiny_teacher: Path, tmp_path: Path) -> None:
    one = a_candidate(asked := asked_for(tiny_teacher, tmp_path))
    names = {asked.result(one), asked.result(replace(one, layers=2))}
    for overrides in (["optim.lr=0.1"], ["run.seed=1"], ["student.init={layers: 2, calibration_tokens: 80}"]):
        names.add(Asked.read(asked.file, overrides, asked.folder, 2).result(one))
    names.add(Asked.read(asked.file, [], asked.folder, 3).result(one))
    save_prompts(tmp_path / "train.jsonl", 25)
    names.add(Asked.read(asked.file, [], asked.folder, 2).result(one))
    assert len(names) == 7
    assert Asked.read(asked.file, ["run.name=other", "eval.every=3"], asked.folder, 2).result(one) in names


# ---- the front


def test_the_front_and_where_it_bends() -> None:
    nats = {10: 5.0, 20: 2.0, 30: 2.5, 40: 1.8, 80: 1.7, 90: None}
    rows = [{"parameters": size, "after_probe": value} for size, value in nats.items() if value is not None]
    rows.append({"parameters": 90})
    assert [row["parameters"] for row in front.pareto(rows)] == [10, 20, 40, 80]
    bend = front.knee(front.pareto(rows))
    assert bend is not None and bend["parameters"] == 20
    bulging = [{"parameters": size, "after_cut": nats} for size, nats in ((10, 5.0), (20, 4.9), (40, 1.0))]
    assert front.knee(front.pareto(bulging)) == bulging[-1]
    assert front.knee([]) is None and front.knee(rows[:1]) == rows[0]
    broken = [{"parameters": 5, "after_cut": float("nan")}, {"parameters": 6, "after_cut": 1.0}]
    assert front.pareto(broken) == broken[1:]


def test_a_failed_candidate_is_named(tiny_teacher: Path) -> None:
    one = candidates_of(str(tiny_teacher), "none").all[0]
    row = {**one.as_record(), "plan": None, "failed": "StepRefusedError: not finite"}
    record = {"candidates": [row], "teacher": "t", "teacher_layers": 4, "teacher_parameters": 1, "choose": "even",
              "calibration_tokens": 9, "probe_steps": 1, "planned_for": "cpu", "not_planned": "a reason"}  # fmt: skip
    assert show.table_rows(record)[0][-1] == "failed" and "no plan, as a reason" in show.caption(record)


# ---- the config that is written

INIT = "student.init={layers: 2, choose: divergence}"


@pytest.mark.parametrize(
    ("student", "written"),
    [
        ("student: {model: x}  # why\n", "student: {init: {layers: 2, choose: divergence}, model: x}  # why\n"),
        ("student: {}\n", "student: {init: {layers: 2, choose: divergence}}\n"),
        ("student:\n  # why\n  model: x\n", "student:\n  # why\n  init: {layers: 2, choose: divergence}\n  model: x\n"),
        (
            "student:\n  init:\n    layers: 3\n# after\n",
            "student:\n  init:\n    {layers: 2, choose: divergence}\n# after\n",
        ),
        ("student: {init: {layers: 3}}  # old\n", "student: {init: {layers: 2, choose: divergence}}  # old\n"),
        ("student:\n# after\n", "student: {init: {layers: 2, choose: divergence}}\n# after\n"),
        ("", "\nstudent: {init: {layers: 2, choose: divergence}}\n"),
    ],
)
def test_comments_stay(student: str, written: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text(f"# head\nteacher: {{model: t}}  # large\n{student}data:\n  train: d.jsonl  # rows\n")
    assert write_with(source, [INIT, "optim.lr=3e-4"], target)
    text = target.read_text()
    assert written in text and "# head\n" in text and "# large" in text and "  # rows\n" in text
    assert load_config(target) == load_config(source, [INIT, "optim.lr=3e-4"])


def test_what_cannot_be_edited_in_place_is_written_without_comments(tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text("teacher: &t {model: t}  # large\nstudent: *t\ndata: {train: d.jsonl}\n")
    assert not write_with(source, [INIT], target)
    assert "#" not in target.read_text() and load_config(target) == load_config(source, [INIT])


# ---- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": "1..2"}, "--share"),
        ({"gpu": "abacus"}, "--gpu"),
        ({"widths": "wide"}, "--widths"),
        ({"out": "run.yaml"}, "--out: .*run.yaml is there already"),
        ({"out": "nowhere/b.yaml"}, "--out: there is no folder"),
        ({"out": "b.yaml", "candidates": 0}, "--pick NAME says which"),
        ({"share": "0.001..0.002"}, "--share: no candidate"),
        ({"pick": "1x1x1"}, "--pick"),
        ({"overrides": ["student.model=x"]}, "student.model: gkd shape cuts"),
        ({"overrides": ["teacher.placement=topk", "teacher.addresses=[http://a:1]"]}, "teacher.placement"),
        ({"overrides": ["data.train=gone.jsonl"]}, "data.train"),
        ({"overrides": ["optim.lr=fast"]}, "optim.lr"),
    ],
)
def test_one_line_before_anything_is_loaded(
    given: dict[str, Any], message: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_for(tiny_teacher, tmp_path)
    monkeypatch.setattr(search, "run_stages", lambda workers, stages: pytest.fail("something was started"))
    options = {"share": "0.1..0.9", "widths": "both", "candidates": 2, "probe_steps": 1, "gpu": "cpu", "pick": None}
    options |= {"folder": asked.folder, "out": None, "overrides": [], **given}
    if options["out"] is not None:
        options["out"] = tmp_path / options["out"]
    with pytest.raises(InputError, match=message):
        shape_command(asked.file, **options)


def test_the_configs_own_choice_of_layers_holds(tiny_teacher: Path, tmp_path: Path) -> None:
    assert asked_for(tiny_teacher, tmp_path).choose == "divergence"
    assert asked_for(tiny_teacher, tmp_path, overrides=["student.init={layers: 2, choose: even}"]).choose == "even"
    with pytest.raises(ConfigError, match="student"):
        make_config({"teacher": {"model": "t"}, "student": {}, "data": {"train": "d"}})
