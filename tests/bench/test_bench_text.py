"""The comparison on text: a whole pass with tiny models, what a judge says of a copy of the teacher, and the marks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import save_prompts

from benchmarks.figures.sections.bench_text import BENCH_TEXT_SECTIONS, drift_plot
from gkd.bench.text import plan, tables
from gkd.bench.text.carried import carry_over
from gkd.bench.text.cell import run_cell
from gkd.bench.text.compare import compare, recorded
from gkd.bench.text.folder import Folder
from gkd.bench.text.marks import common_seconds, readings, step_seconds
from gkd.bench.text.methods import BY_SOURCE, ON_POLICY_REVERSE, SFT, START, SUPERVISED_KD, Cell
from gkd.bench.text.sizes import SIZES, Material, Size, size_named
from gkd.bench.work import Job
from gkd.cli.bench import text_command
from gkd.errors import InputError
from gkd.rollout.offline import start_sampler

TINY = replace(
    SIZES["full"],
    name="tiny",
    methods=(SUPERVISED_KD, BY_SOURCE),
    seeds=2,
    rounds=1,
    timed_steps=2,
    trained_tokens=40,
    looks=2,
    heldout_prompts=3,
    layers=2,
    engine="transformers",
    batch_size=4,
    micro_batch_size=2,
    warmup_steps=0,
    max_new_tokens=6,
    positions=2,
)


def complete_here(spec: Any, jobs: Sequence[Any], note: Any, whose: str = "teacher") -> None:
    """`gkd.rollout.offline.complete` without a process of its own."""
    del note, whose
    with closing(start_sampler(spec)) as sampler:
        for cache, settings, requests in jobs:
            if missing := cache.missing(requests):
                cache.add(missing, sampler.generate(missing, settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Folder]:
    """With everything that a run starts from."""
    root = tmp_path_factory.mktemp("text")
    material = Material(str(tiny_teacher), save_prompts(root / "train.jsonl", 24), save_prompts(root / "held.jsonl", 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKD_CACHE", str(root / "cache"))
        patch.setattr("gkd.train.parts.texts.complete", complete_here)
        yield Folder(root / "tiny", TINY, material)


def do(jobs: Sequence[Job]) -> list[str]:
    """As `Workers`, in this process."""
    return [job.work(*job.arguments) for job in jobs if not job.target.exists()]


def test_a_whole_comparison_is_kept_and_read_at_both_marks(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    for jobs in plan.stages(folder, "all"):
        do(jobs)
    assert not any(do(jobs) for jobs in plan.stages(folder, "all"))  # started again: nothing is left

    out = folder.root / "bench_text_tiny.json"
    compare(TINY, folder.material, folder=folder.root.parent, part="all", out=out, so_far=True, say=print)
    record = json.loads(out.read_text())
    runs = {(run["method"], run["seed"]): run for run in record["runs"]}
    assert len(runs) == record["planned_runs"] == 5 and not any("failed" in run for run in runs.values())
    supervised = [runs[(SUPERVISED_KD.label, seed)] for seed in (0, 1)]
    assert supervised[0]["looks"][0]["on_teacher"] == runs[(START.label, 0)]["looks"][0]["on_teacher"]
    by_source = runs[(BY_SOURCE.label, 1)]
    assert [look["step"] for look in by_source["looks"]] == sorted({look["step"] for look in by_source["looks"]})
    assert 0 < by_source["sampled_tokens"] < by_source["trained_tokens"] and supervised[0]["sampled_tokens"] == 0
    assert supervised[0]["trained_tokens"] >= 1.5 * TINY.trained_tokens and supervised[0]["looks"][-1]["step"] > 1
    assert supervised[0]["looks"][-1] != supervised[1]["looks"][-1]
    assert by_source["looks"][0]["positions"]["on_own"]["bucket_tokens"] == TINY.max_new_tokens // TINY.positions
    for mark in ("tokens", "seconds"):
        rows = tables.mark_rows(record, mark)
        assert [row[0] for row in rows[1:]] == [*tables.labels(record), "the teacher itself"]
        assert len({len(row) for row in rows}) == 1
    (timed,) = record["times"]
    assert {*timed} == {plan.TEXTS, SUPERVISED_KD.label, BY_SOURCE.label}
    machine = timed[SUPERVISED_KD.label]["machine"]
    assert {*machine} == {"load_before", "load_after", "stolen_share"} and 0.0 <= machine["stolen_share"] <= 1.0
    shown = capsys.readouterr().out
    assert "at equally many seconds" in shown and f"against {SUPERVISED_KD.label}, at 95 %" in shown
    assert tables.NOT_TIMED in tables.verdict({**record, "times": []})
    one_seed = {**record, "runs": [run for run in record["runs"] if run["seed"] == 0]}
    assert "At equal tokens there are no two seeds yet" in tables.verdict(one_seed)
    sections = {name: make(folder.root) for name, make in BENCH_TEXT_SECTIONS.items()}
    assert f"against {SUPERVISED_KD.label}, at 95 %" in sections.pop("bench_text-verdict")
    assert all(f"| {SUPERVISED_KD.label} |" in text for text in sections.values())
    assert drift_plot(record, "bench_text_tiny", folder.root).name in sections["bench_text-drift"]


def test_another_machine_goes_on_from_a_record(folder: Folder, tmp_path: Path) -> None:
    """It cuts the same student without measuring, is judged on the same texts, and runs what is missing alone."""
    out = tmp_path / "record.json"
    for jobs in plan.stages(folder, "runs"):
        do(jobs)
    compare(TINY, folder.material, folder=folder.root.parent, part="runs", out=out, so_far=True, say=print)
    record = json.loads(out.read_text())
    last = record["runs"].pop()
    out.write_text(json.dumps(record))
    there = Folder(tmp_path / "tiny", TINY, folder.material)
    assert carry_over(there, out) == len(record["runs"]) == 4
    assert carry_over(there, out) == 0  # once more changes nothing
    missing = [job for jobs in plan.stages(there, "runs") for job in jobs if not job.target.exists()]
    assert [job.label for job in missing] == ["the student", f"{last['method']}, seed {last['seed']}"]
    do(missing)
    assert (there.student / "model.safetensors").read_bytes() == (folder.student / "model.safetensors").read_bytes()
    again = recorded(there)
    same = ("looks", "trained_tokens", "sampled_tokens", "steps", "method", "seed", "device")
    assert [{name: run[name] for name in same} for run in again["runs"]] == [
        {name: run[name] for name in same} for run in (*record["runs"], last)
    ]
    assert again["teacher_texts"] == record["teacher_texts"] and again["key"] == record["key"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": "another"}, "is of another model, other prompts, or another size"),
        ({"student_layers": [0, 1, 2]}, "start from another cut or are judged on other texts"),
        ({"teacher_texts": {"sampled": [], "greedy": []}}, "start from another cut or are judged on other texts"),
        (None, "is no record of gkd bench text that can be gone on from"),
    ],
)
def test_a_record_of_something_else_is_refused(
    folder: Folder, tmp_path: Path, change: dict[str, Any] | None, error: str
) -> None:
    for jobs in [*plan.stages(folder, "runs")][:2]:
        do(jobs)
    record = {**recorded(folder), "student_layers": folder.kept_layers()}
    out = tmp_path / "record.json"
    out.write_text(json.dumps([] if change is None else record | change))
    with pytest.raises(InputError, match=error):
        carry_over(folder, out)
    out.write_text("{")
    with pytest.raises(InputError, match=r"--continue: .*record\.json cannot be read"):
        carry_over(folder, out)


def test_a_copy_of_the_teacher_is_no_nat_from_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers are the teacher's, and its surprise at the copy's samples is the copy's own entropy."""
    do([job for jobs in plan.stages(folder, "times") for job in jobs[:1]])
    monkeypatch.setattr(Folder, "student", folder.material.teacher)
    done = run_cell(folder, Cell(START, 0))
    (look,) = done["looks"]
    for texts in ("on_teacher", "on_own"):
        assert look[texts] == pytest.approx({"forward_kl": 0.0, "reverse_kl": 0.0, "jsd": 0.0}, abs=2e-3)  # of rounding
    assert look["rouge_l"] == 1.0
    assert look["teacher_nll"] == pytest.approx(done["teacher"]["teacher_nll"], rel=0.5)
    assert look["answer_tokens"] == done["teacher"]["answer_tokens"]


# ---- marks


def record(size: Size, steps: dict[str, int], step_s: dict[str, float], text_s: float) -> dict[str, Any]:
    """Runs of 100 tokens a step with a look at every second step; the first timed step is slow."""
    methods = [SFT, ON_POLICY_REVERSE]

    def looks(count: int) -> list[dict[str, int]]:
        return [{"step": step, "tokens": 100 * step} for step in range(0, count + 1, 2)]

    timed = {label: {"steps": [{"all": 99.0}, {"all": seconds}]} for label, seconds in step_s.items()}
    return {
        "size": {
            "trained_tokens": size.trained_tokens,
            "batch_size": size.batch_size,
            "methods": [{"label": m.label, "student_share": m.student_share} for m in methods],
        },
        "times": [{**timed, plan.TEXTS: {"text_s": text_s}}],
        "runs": [{"method": m.label, "seed": 0, "looks": looks(steps[m.label])} for m in methods],
    }


def test_marks_are_looks_at_equal_tokens_and_within_equal_seconds() -> None:
    size = replace(TINY, trained_tokens=700, batch_size=10)
    fast, slow = SFT.label, ON_POLICY_REVERSE.label
    found = record(size, {fast: 20, slow: 10}, {fast: 1.0, slow: 3.0}, text_s=0.1)
    assert step_seconds(found) == pytest.approx({SFT.label: 2.0, ON_POLICY_REVERSE.label: 3.0})
    assert common_seconds(found) == pytest.approx(30.0)  # where the slower run ends; the other goes on to 40
    steps = {
        (method.label, mark): [reading.look["step"] for reading in readings(found, method.label, mark)]
        for method in (SFT, ON_POLICY_REVERSE)
        for mark in ("tokens", "seconds")
    }
    assert steps[(SFT.label, "tokens")] == steps[(ON_POLICY_REVERSE.label, "tokens")] == [8]  # the first with 700
    assert steps[(SFT.label, "seconds")] == [14] and steps[(ON_POLICY_REVERSE.label, "seconds")] == [10]


def test_without_timing_there_is_no_mark_of_seconds() -> None:
    found = {**record(TINY, {SFT.label: 2, ON_POLICY_REVERSE.label: 2}, {}, 0.0), "times": []}
    assert step_seconds(found) == {} and common_seconds(found) == 0.0
    assert [reading.look["step"] for reading in readings(found, SFT.label, "tokens")] == [2]


def test_options_that_make_no_sense_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--size: 'huge'"):
        size_named("huge")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"out": Path("a.csv")}, "--out: a.csv"),
        ({"train": tmp_path / "no"}, "--train: there is no"),
    ]
    for options, said in cases:
        with pytest.raises(InputError, match=said):
            text_command(**options)
    with pytest.raises(InputError, match="--part: 'most' is none of all, runs, times"):
        plan.part_named("most")
    here = save_prompts(tmp_path / "train.jsonl", 2)
    common: dict[str, Any] = {"folder": tmp_path / "runs", "part": "all", "out": None, "say": print}
    with pytest.raises(InputError, match=r"--heldout: there is no file .*gone\.jsonl"):
        compare(TINY, Material("any", here, tmp_path / "gone.jsonl"), so_far=False, **common)
    with pytest.raises(InputError, match="--so-far: no run is finished"):
        compare(TINY, Material("any", here, here), so_far=True, **common)
    assert not (tmp_path / "runs").exists()


def test_the_verdict_is_sure_only_of_what_all_seeds_agree_on() -> None:
    """Supervised KD at 1; one method is better by about 0.5 in every seed, the other in the mean alone."""
    spread = ((SUPERVISED_KD, (1.0, 1.1, 0.9)), (SFT, (0.5, 0.62, 0.41)), (ON_POLICY_REVERSE, (0.1, 1.9, 0.4)))

    def look(value: float) -> dict[str, Any]:
        texts = {"forward_kl": value, "reverse_kl": value, "jsd": value}
        return {"step": 1, "tokens": 9, "on_teacher": texts, "on_own": texts, "teacher_nll": value, "rouge_l": value}

    runs = [
        {"method": method.label, "seed": seed, "looks": [look(value)]}
        for method, values in spread
        for seed, value in enumerate(values)
    ]
    said = tables.verdict({"size": {"trained_tokens": 9}, "times": [], "runs": runs})
    assert f"JSD, own: better {SFT.label}. " in said and f"Rouge-L, %: worse {SFT.label}. " in said
    assert ON_POLICY_REVERSE.label not in said and "Undecided: 7 of 14 comparisons." in said
