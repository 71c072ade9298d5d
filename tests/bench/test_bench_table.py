"""The comparison table: verifiers, controls, equal tokens, statistics, and the whole at the smallest size."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import check, run_gkd, run_python

from gkd.bench import additions, methods
from gkd.bench.additions import ADAPTIVE, ASSISTANT
from gkd.bench.budget import TokenBudget
from gkd.bench.cell import CellRun, run_cell
from gkd.bench.differences import addition_rows, additions_verdict
from gkd.bench.folder import Folder
from gkd.bench.methods import FIXED_NEGATIVE, JSD, SFT, START, SUPERVISED_KD, Cell, cells, gkd
from gkd.bench.models import VOCABULARY, decode, encode, make_model, save_model
from gkd.bench.prepare import make_student, make_teacher, write_teacher_texts, write_train_files
from gkd.bench.score import Prompt, PromptDraw, Rollout, pass_at_k
from gkd.bench.sizes import SIZES
from gkd.bench.summary import estimate, gain_ratio, ratio_of_means
from gkd.bench.tasks import TASKS, Problem, is_right, problems
from gkd.bench.work import Job, Workers, run_stages
from gkd.teacher.unasked import Unasked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the smallest size, with everything that a cell of seed 0 starts from."""
    made = Folder(tmp_path_factory.mktemp("table"), SIZES["smoke"])
    make_teacher(made)
    make_student(made, 0)
    make_student(made.assistant, 0)
    write_teacher_texts(made)
    write_train_files(made, 0)
    return made


# ---- problems


def test_every_answer_that_is_made_is_right_and_prompts_are_new() -> None:
    made = problems(0, 200)
    assert all(is_right(problem, problem.answer) for problem in made)
    assert len({problem.prompt for problem in made}) == len(made) == 200 * len(TASKS)
    prompts = {problem.prompt for problem in made}
    assert prompts.isdisjoint(problem.prompt for problem in problems(1, 200, prompts))
    assert problems(0, 200) == made != problems(1, 200)


@pytest.mark.parametrize(
    ("task", "prompt", "right", "wrong"),
    [
        ("chain", "t7295=", ["091823", "081823", "23"], ["091832", "0918", "", "091823,", "3"]),
        ("counting", "cbaabab=", ["a3b3"], ["b3a3", "a3", "a3b4", "3a3b"]),
        ("sorting", "sgkbaz=", ["abgkz"], ["abgk", "abgkzz", "gkbaz", ""]),
        ("spacing", "paaabbc=", ["abacab", "bacaba"], ["aabbac", "abaca", "abacac", "abacabc", ""]),
    ],
)
def test_verifiers(task: str, prompt: str, right: list[str], wrong: list[str]) -> None:
    problem = Problem(task, prompt, right[0])
    assert [is_right(problem, text) for text in (*right, *wrong)] == [True] * len(right) + [False] * len(wrong)


def test_text_and_tokens_are_the_same_in_gkds_tokenizer_and_here(folder: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.teacher)
    for problem in problems(3, 20):
        ids = tokenizer(problem.prompt + problem.answer)["input_ids"]
        assert ids == encode(problem.prompt + problem.answer)
        assert decode([*ids, tokenizer.eos_token_id]) == problem.prompt + problem.answer


# ---- methods


def test_the_grid_is_whole_and_no_cell_runs_twice() -> None:
    size = SIZES["cpu"]
    found = cells(size)
    assert len(set(found)) == len(found)
    grid = {(c.method.label, c.seed) for c in found if c.method.group == "grid"}
    assert len([cell for cell in grid if cell[1] < size.seeds]) == 6 * 3 * size.seeds
    assert {cell.seed for cell in found if cell.method == SUPERVISED_KD} == set(range(size.main_seeds))


def test_an_addition_stands_beside_one_that_runs_with_the_same_seeds() -> None:
    size = SIZES["cpu"]
    found = additions.cells(size)
    assert len(set(found)) == len(found)
    labels = list(dict.fromkeys(cell.method.label for cell in found))
    for method in additions.methods(size):
        assert {cell.seed for cell in found if cell.method == method} == set(range(size.seeds))
        if method.group == "addition":
            assert labels.index(method.beside) < labels.index(method.label)


def test_a_cells_name_hangs_on_what_decides_it(tmp_path: Path) -> None:
    size = SIZES["smoke"]
    cell = Cell(SFT, 0)
    path = Folder(tmp_path, size).result(cell)
    same = [replace(size, seeds=7), replace(size, name="other")]
    other = [replace(size, lr=2e-3), replace(size, student=replace(size.student, layers=2))]
    assert {Folder(tmp_path, changed).result(cell) for changed in same} == {path}
    assert path not in {Folder(tmp_path, changed).result(cell) for changed in other}
    assert path != Folder(tmp_path, size).result(Cell(SFT, 1))
    assert path != Folder(tmp_path, size).result(Cell(replace(SFT, objective={"kind": "reverse_kl"}), 0))


# ---- cells


@pytest.mark.parametrize("name", ["SFT", "SUPERVISED_KD", "FIXED_NEGATIVE"])
def test_cells_train_on_equally_many_tokens_and_are_scored(folder: Any, name: str) -> None:
    method = getattr(methods, name)
    done = run_cell(folder, Cell(method, 0))
    size = folder.size
    longest_batch = size.batch_size * size.max_new_tokens
    assert size.trained_tokens <= done["trained_tokens"] < size.trained_tokens + longest_batch
    assert done["sampled_tokens"] == (done["trained_tokens"] if method.student_share == 1 else 0)
    assert [look["tokens"] for look in done["curve"]][-1] == done["trained_tokens"]
    assert set(done["scores"]["greedy"]) == set(TASKS)
    assert done["scores"]["forward_kl"] > 0 and done["scores"]["reverse_kl"] > 0


@pytest.mark.parametrize("name", ["FEATURES", "RKD", "MINILLM_MIXED", "SPECULATIVE", "REPLAY", "DYNAMIC_WEIGHTS"])
def test_additions_train_on_as_many_tokens(folder: Any, name: str) -> None:
    """One of each kind: states of layers, vectors of texts, both models drawing, old texts, a rule over the weights."""
    method = getattr(additions, name)
    done = run_cell(folder, Cell(method, 0))
    size = folder.size
    assert size.trained_tokens <= done["trained_tokens"] < size.trained_tokens + size.batch_size * size.max_new_tokens
    assert (done["sampled_tokens"] > 0) == (method.mixture.get("dataset", 0.0) < 1)
    assert (done["sampled_tokens"] < done["trained_tokens"]) == (name != "SPECULATIVE")
    assert done["scores"]["forward_kl"] > 0


def test_an_assistant_is_taught_and_teaches_and_the_teacher_judges(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens each. The judge knows the student's divergence from the teacher, not from the assistant."""
    runs: list[CellRun] = []
    result = CellRun.result
    monkeypatch.setattr(CellRun, "result", lambda run: runs.append(run) or result(run))
    saved: dict[str, Any] = {}
    monkeypatch.setattr(
        "gkd.bench.cell.save_model", lambda model, path: saved.update({str(path): model}) or save_model(model, path)
    )
    done = run_cell(folder, Cell(ASSISTANT, 0))
    first, second = runs
    assert done["trained_tokens"] == first.budget.trained + second.budget.trained
    assert first.budget.tokens == second.budget.tokens == folder.size.trained_tokens // 2
    assert done["assistant"]["trained_tokens"] == first.budget.trained

    taught, teaching = dict(first.student.weights()), saved[second.config.teacher.model].state_dict()
    assert all(torch.equal(taught[name], teaching[name]) for name in taught)
    assert first.config.teacher.model == str(folder.teacher)
    assert second.judge.teacher is first.teacher


def test_a_rule_follows_a_divergence_that_is_measured_while_a_cell_trains(folder: Any) -> None:
    budget = TokenBudget(folder.size.trained_tokens, 1)
    run = CellRun(folder, Cell(ADAPTIVE, 0), budget)
    seen: list[Any] = []
    observe = run.student.observe
    run.student.observe = lambda metrics: seen.append(metrics.get("heldout/forward_kl", 0.0)) or observe(metrics)
    run.greedy_curve()
    assert budget.step_count >= len([value for value in seen if value > 0]) > 1


def test_the_same_cell_gives_the_same_numbers(folder: Any) -> None:
    cell = Cell(gkd(JSD, 0.5), 0)
    one, other = (run_cell(folder, cell) for _ in range(2))
    assert one["scores"] == other["scores"] and one["curve"] == other["curve"]


@pytest.mark.parametrize("name", ["FIXED_NEGATIVE", "SFT"])
def test_no_teacher_is_in_the_controls_training(folder: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another teacher gives bitwise the same student, which supervised KD would not."""
    cell = Cell(getattr(methods, name), 0)
    supervised = Cell(SUPERVISED_KD, 0)

    def trained(teacher_seed: int | None, chosen: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            if teacher_seed is not None:
                other = folder.root / f"other-teacher-{teacher_seed}"
                save_model(make_model(folder.size.teacher, teacher_seed), other)
                patch.setattr(type(folder), "teacher", other)
            run = CellRun(folder, chosen, TokenBudget(100, 1))
            run.greedy_curve()
            return torch.cat([p.flatten().clone() for _, p in run.student.weights()])

    assert torch.equal(trained(None, cell), trained(99, cell))
    assert not torch.equal(trained(None, supervised), trained(99, supervised))


def test_the_fixed_negative_advantage_lowers_what_was_sampled(folder: Any) -> None:
    """Its gradient is that of the mean log-probability of the sampled tokens, nothing else."""
    cell = Cell(FIXED_NEGATIVE, 0)
    run = CellRun(folder, cell, TokenBudget(1, 1))
    assert not run.config.objective.needs_teacher
    prompt = [*encode("sba=")]
    answer = [*encode("ab"), VOCABULARY["<end>"]]
    before = run.student.token_logprobs(prompt + answer, len(prompt))
    rollout = Rollout(PromptDraw(Prompt(0, tuple(prompt), ""), 0), "student", tuple(answer))
    scores = Unasked().score([rollout])
    losses = [run.student.step(run.pack([rollout], scores), step)["loss"] for step in range(3)]
    assert losses[0] == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert sum(run.student.token_logprobs(prompt + answer, len(prompt))) < sum(before)


# ---- figures


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    from itertools import combinations

    outcomes = [True, True, False, False, False]
    for k in (1, 2, 3, 4):
        draws = list(combinations(outcomes, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_intervals_are_students_t() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.303 / 3**0.5)
    assert estimate([1.0]).half_width is None


def test_the_ratios_interval_covers_it_as_often_as_it_says() -> None:
    """Pairs of gains whose true ratio is 2, three seeds at a time."""
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(2000):
        below = 10 + torch.randn(3, generator=generator)
        above = 2 * below + 2 * torch.randn(3, generator=generator)
        interval = ratio_of_means(above.tolist(), below.tolist()).interval
        covered.append(interval is None or interval[0] <= 2 <= interval[1])
    assert 0.93 < sum(covered) / len(covered) < 0.97


def test_a_ratio_to_a_gain_that_may_be_nothing_has_no_interval() -> None:
    assert ratio_of_means([1.0, 1.1, 0.9], [0.1, -0.1, 0.05]).interval is None


def test_a_ratio_to_a_loss_is_none() -> None:
    """Less of a loss than the baseline's would read as a gain."""

    def cells(label: str, *greedy: float) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "setting": "", "method": {"label": label}, "scores": {"greedy": {"all": one}}}
            for seed, one in enumerate(greedy)
        ]

    known = [*cells(START.label, 0.5, 0.5), *cells("worse", 0.4, 0.3), *cells("worst", 0.1, 0.2)]

    def figure(cell: dict[str, Any]) -> float:
        return cell["scores"]["greedy"]["all"]

    assert gain_ratio(known, "worst", "worse", figure) is None
    known += cells("better", 0.6, 0.7)
    assert gain_ratio(known, "worst", "better", figure).value < 0


def test_a_difference_is_between_cells_of_one_seed() -> None:
    def cells(label: str, greedy: dict[int, float], beside: str = "") -> list[dict[str, Any]]:
        method = {"label": label, "group": "addition" if beside else "grid", "beside": beside}
        scores = {"forward_kl": 0.2, "reverse_kl": 0.3}
        return [
            {"seed": seed, "setting": "", "method": method}
            | {"scores": {**scores, "greedy": {"all": one}, "sampled": {"all": -one}}}
            for seed, one in greedy.items()
        ]

    record = {
        "cells": cells("plain", {0: 0.1, 1: 0.5, 2: 0.3, 3: 0.9}) + cells("more", {0: 0.2, 1: 0.6, 2: 0.41}, "plain")
    }
    header, row = addition_rows(record)
    assert row[:2] == ["more", "plain"] and row[-1] == "3"
    assert row[header.index("greedy, points")].startswith("+10.3 ± 1.4")
    told = additions_verdict(record)
    assert "greedy accuracy, beside the method without it and at 95 %, more: more. Less: none." in told
    assert "sampled accuracy, beside the method without it and at 95 %, more: none. Less: more." in told


# ---- jobs


def touch(path: str) -> str:
    Path(path).write_text("made")
    return "made"


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    jobs = [Job(name, tmp_path / name, touch, (str(tmp_path / name),)) for name in "abc"]
    (tmp_path / "b").write_text("kept")
    said: list[str] = []
    with Workers(1, said.append) as workers:
        workers.run(jobs)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["made", "kept", "made"]
    assert said[0] == "1 of 3 were made before" and len(said) == 3


def wait_to_be_ended(path: str) -> str:
    Path(path).write_text(str(os.getpid()))
    time.sleep(300)
    return "not ended"


def test_a_signal_ends_what_is_running_too(tmp_path: Path) -> None:
    """At the end of a process the interpreter would wait for its workers, which work for minutes."""
    pid_file = tmp_path / "pid"
    before = signal.getsignal(signal.SIGTERM)

    def end_when_running() -> None:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_when_running, daemon=True)
    thread.start()
    try:
        with pytest.raises(SystemExit, match="the same command goes on"):
            run_stages(Workers(1, print), [[Job("long", tmp_path / "never", wait_to_be_ended, (str(pid_file),))]])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# ---- the whole


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_gkd(["bench", "table", *arguments], cwd=cwd, timeout_s=500)


@pytest.mark.slow
@pytest.mark.long
def test_the_smallest_table_from_end_to_end(tmp_path: Path) -> None:
    """In a folder with nothing of the repository in it: the package alone is enough."""
    arguments = ["--size", "smoke", "--folder", "work", "--out", "gkd_table_smoke.json"]
    done = bench(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gkd_table_smoke.json").read_text())
    with (tmp_path / "gkd_table_smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["cells"]) > 30 and not any("failed" in cell for cell in record["cells"])
    assert "initial student" in done.stdout and "λ = 0.5" in done.stdout

    again = bench(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and " of " in again.stdout and "min left" not in again.stdout
    assert json.loads((tmp_path / "gkd_table_smoke.json").read_text())["cells"] == record["cells"]

    page = tmp_path / "page.md"
    names = ("gkd_table", "gkd_table-tasks", "gkd_table-grid", "gkd_table-temperature", "gkd_table-ratios")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    tables = ["-m", "benchmarks.figures.tables", "--results", tmp_path, "--write", page, "--plots", tmp_path]
    check(run_python(tables))
    assert page.read_text().count("| SFT |") == 2 and (tmp_path / "gkd_table_smoke_grid.svg").exists()


@pytest.mark.slow
@pytest.mark.long
def test_the_smallest_table_of_additions_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "gkd_additions_smoke.json"
    done = bench("--part", "additions", "--size", "smoke", "--folder", "work", "--out", out.name, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == len(additions.cells(SIZES["smoke"])) and not any("failed" in cell for cell in cells)
    assert "MiniLLM" in done.stdout and "Undecided" in done.stdout

    page = tmp_path / "page.md"
    names = ("gkd_additions", "gkd_additions-tasks", "gkd_additions-differences", "gkd_additions-verdict")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    check(run_python(["-m", "benchmarks.figures.tables", "--results", tmp_path, "--write", page, "--plots", tmp_path]))
    assert page.read_text().count("| teacher assistant |") == 3
    assert (tmp_path / "gkd_additions_smoke_differences.svg").exists()


def test_options_that_make_no_sense_are_refused_at_once(tmp_path: Path) -> None:
    for option, value in (("--size", "huge"), ("--out", "table.csv"), ("--part", "all")):
        done = bench(option, value, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert f"{option}: " in done.stderr and value in done.stderr


def test_without_anything_finished_there_is_nothing_to_show(tmp_path: Path) -> None:
    done = bench("--size", "smoke", "--so-far", cwd=tmp_path)
    assert done.returncode == 2 and "nothing is finished in runs/gkd_table/smoke" in done.stderr
