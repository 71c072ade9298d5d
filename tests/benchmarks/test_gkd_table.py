"""The comparison table: verifiers, controls, equal tokens, statistics, and the whole at the smallest size."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("cell", "controls", "folder", "methods", "models", "pages", "plan", "prepare", "score", "sizes", "summary")


@pytest.fixture(scope="module")
def table() -> Iterator[SimpleNamespace]:
    """The package, imported as the script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = (*MODULES, "tasks", "work")
        yield SimpleNamespace(**{name: importlib.import_module(f"table.{name}") for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(table: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the smallest size, with everything that a cell of seed 0 starts from."""
    made = table.folder.Folder(tmp_path_factory.mktemp("table"), table.sizes.SIZES["smoke"])
    table.prepare.make_teacher(made)
    table.prepare.make_student(made, 0)
    table.prepare.write_teacher_texts(made)
    table.prepare.write_train_files(made, 0)
    return made


# ---- problems


def test_every_answer_that_is_made_is_right_and_prompts_are_new(table: SimpleNamespace) -> None:
    tasks = table.tasks
    made = tasks.problems(0, 200)
    assert all(tasks.is_right(problem, problem.answer) for problem in made)
    assert len({problem.prompt for problem in made}) == len(made) == 200 * len(tasks.TASKS)
    prompts = {problem.prompt for problem in made}
    assert prompts.isdisjoint(problem.prompt for problem in tasks.problems(1, 200, prompts))
    assert tasks.problems(0, 200) == made != tasks.problems(1, 200)


@pytest.mark.parametrize(
    ("task", "prompt", "right", "wrong"),
    [
        ("chain", "t7295=", ["091823", "081823", "23"], ["091832", "0918", "", "091823,", "3"]),
        ("counting", "cbaabab=", ["a3b3"], ["b3a3", "a3", "a3b4", "3a3b"]),
        ("sorting", "sgkbaz=", ["abgkz"], ["abgk", "abgkzz", "gkbaz", ""]),
        ("spacing", "paaabbc=", ["abacab", "bacaba"], ["aabbac", "abaca", "abacac", "abacabc", ""]),
    ],
)
def test_verifiers(table: SimpleNamespace, task: str, prompt: str, right: list[str], wrong: list[str]) -> None:
    problem = table.tasks.Problem(task, prompt, right[0])
    assert [table.tasks.is_right(problem, text) for text in (*right, *wrong)] == [True] * len(right) + [False] * len(
        wrong
    )


def test_text_and_tokens_are_the_same_in_gkds_tokenizer_and_here(table: SimpleNamespace, folder: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.teacher)
    for problem in table.tasks.problems(3, 20):
        ids = tokenizer(problem.prompt + problem.answer)["input_ids"]
        assert ids == table.models.encode(problem.prompt + problem.answer)
        assert table.models.decode([*ids, tokenizer.eos_token_id]) == problem.prompt + problem.answer


# ---- methods


def test_the_grid_is_whole_and_no_cell_runs_twice(table: SimpleNamespace) -> None:
    methods, size = table.methods, table.sizes.SIZES["cpu"]
    found = methods.cells(size)
    assert len(set(found)) == len(found)
    grid = {(c.method.objective.label, c.method.student_share, c.seed) for c in found if c.method.group == "grid"}
    assert len([cell for cell in grid if cell[2] < size.seeds]) == 6 * 3 * size.seeds
    assert {cell.seed for cell in found if cell.method == methods.SUPERVISED_KD} == set(range(size.main_seeds))


def test_a_cells_name_hangs_on_what_decides_it(table: SimpleNamespace, tmp_path: Path) -> None:
    methods, size = table.methods, table.sizes.SIZES["smoke"]
    cell = methods.Cell(methods.SFT, 0)
    path = table.folder.Folder(tmp_path, size).result(cell)
    same = [replace(size, seeds=7), replace(size, name="other")]
    other = [replace(size, lr=2e-3), replace(size, student=replace(size.student, layers=2))]
    assert {table.folder.Folder(tmp_path, changed).result(cell) for changed in same} == {path}
    assert path not in {table.folder.Folder(tmp_path, changed).result(cell) for changed in other}
    assert path != table.folder.Folder(tmp_path, size).result(methods.Cell(methods.SFT, 1))


# ---- cells


@pytest.mark.parametrize("name", ["SFT", "SUPERVISED_KD", "FIXED_NEGATIVE"])
def test_cells_train_on_equally_many_tokens_and_are_scored(table: SimpleNamespace, folder: Any, name: str) -> None:
    method = getattr(table.methods, name)
    done = table.cell.run_cell(folder, table.methods.Cell(method, 0))
    size = folder.size
    longest_batch = size.batch_size * size.max_new_tokens
    assert size.trained_tokens <= done["trained_tokens"] < size.trained_tokens + longest_batch
    assert done["sampled_tokens"] == (done["trained_tokens"] if method.student_share == 1 else 0)
    assert [look["tokens"] for look in done["curve"]][-1] == done["trained_tokens"]
    assert set(done["scores"]["greedy"]) == set(table.tasks.TASKS)
    assert done["scores"]["forward_kl"] > 0 and done["scores"]["reverse_kl"] > 0


def test_the_same_cell_gives_the_same_numbers(table: SimpleNamespace, folder: Any) -> None:
    cell = table.methods.Cell(table.methods.gkd(table.methods.JSD, 0.5), 0)
    one, other = (table.cell.run_cell(folder, cell) for _ in range(2))
    assert one["scores"] == other["scores"] and one["curve"] == other["curve"]


@pytest.mark.parametrize("name", ["FIXED_NEGATIVE", "SFT"])
def test_no_teacher_is_in_the_controls_training(
    table: SimpleNamespace, folder: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Another teacher gives bitwise the same student, which supervised KD would not."""
    cells = table.cell
    cell = table.methods.Cell(getattr(table.methods, name), 0)
    supervised = table.methods.Cell(table.methods.SUPERVISED_KD, 0)

    def trained(teacher_seed: int | None, chosen: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            if teacher_seed is not None:
                other = folder.root / f"other-teacher-{teacher_seed}"
                table.models.save_model(table.models.make_model(folder.size.teacher, teacher_seed), other)
                patch.setattr(type(folder), "teacher", other)
            run = cells.CellRun(folder, chosen, cells.TokenBudget(100, 1))
            run.curve()
            return torch.cat([p.flatten().clone() for _, p in run.student.weights()])

    assert torch.equal(trained(None, cell), trained(99, cell))
    assert not torch.equal(trained(None, supervised), trained(99, supervised))


def test_the_fixed_negative_advantage_lowers_what_was_sampled(table: SimpleNamespace, folder: Any) -> None:
    """Its gradient is that of the mean log-probability of the sampled tokens, nothing else."""
    cells, methods = table.cell, table.methods
    cell = methods.Cell(methods.FIXED_NEGATIVE, 0)
    run = cells.CellRun(folder, cell, cells.TokenBudget(1, 1))
    assert type(run.student) is table.controls.FixedNegativeAdvantage
    assert type(run.teacher) is table.controls.NoTeacher
    prompt = [*table.models.encode("sba=")]
    answer = [*table.models.encode("ab"), table.models.VOCABULARY["<end>"]]
    before = run.student.token_logprobs(prompt + answer, len(prompt))
    rollout = table.score.Rollout(
        table.score.PromptDraw(table.score.Prompt(0, tuple(prompt), ""), 0), "student", tuple(answer)
    )
    scores = run.teacher.score([rollout])
    losses = [run.student.step(run.pack([rollout], scores), step)["loss"] for step in range(3)]
    assert losses[0] == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert sum(run.student.token_logprobs(prompt + answer, len(prompt))) < sum(before)


# ---- figures


def test_pass_at_k_is_the_share_of_draws_with_a_right_one(table: SimpleNamespace) -> None:
    from itertools import combinations

    outcomes = [True, True, False, False, False]
    for k in (1, 2, 3, 4):
        draws = list(combinations(outcomes, k))
        assert table.score.pass_at_k(5, 2, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_intervals_are_students_t(table: SimpleNamespace) -> None:
    found = table.summary.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.303 / 3**0.5)
    assert table.summary.estimate([1.0]).half_width is None


def test_the_ratios_interval_covers_it_as_often_as_it_says(table: SimpleNamespace) -> None:
    """Pairs of gains whose true ratio is 2, three seeds at a time."""
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(2000):
        below = 10 + torch.randn(3, generator=generator)
        above = 2 * below + 2 * torch.randn(3, generator=generator)
        interval = table.summary.ratio_of_means(above.tolist(), below.tolist()).interval
        covered.append(interval is None or interval[0] <= 2 <= interval[1])
    assert 0.93 < sum(covered) / len(covered) < 0.97


def test_a_ratio_to_a_gain_that_may_be_nothing_has_no_interval(table: SimpleNamespace) -> None:
    assert table.summary.ratio_of_means([1.0, 1.1, 0.9], [0.1, -0.1, 0.05]).interval is None


def test_a_ratio_to_a_loss_is_none(table: SimpleNamespace) -> None:
    """Less of a loss than the baseline's would read as a gain."""

    def cells(label: str, *greedy: float) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "setting": "", "method": {"label": label}, "scores": {"greedy": {"all": one}}}
            for seed, one in enumerate(greedy)
        ]

    known = [*cells(table.methods.START.label, 0.5, 0.5), *cells("worse", 0.4, 0.3), *cells("worst", 0.1, 0.2)]

    def figure(cell: dict[str, Any]) -> float:
        return cell["scores"]["greedy"]["all"]

    assert table.summary.gain_ratio(known, "worst", "worse", figure) is None
    known += cells("better", 0.6, 0.7)
    assert table.summary.gain_ratio(known, "worst", "better", figure).value < 0


# ---- jobs


def touch(path: str) -> str:
    Path(path).write_text("made")
    return "made"


def test_what_is_there_is_not_made_again(table: SimpleNamespace, tmp_path: Path) -> None:
    jobs = [table.work.Job(name, tmp_path / name, touch, (str(tmp_path / name),)) for name in "abc"]
    (tmp_path / "b").write_text("kept")
    said: list[str] = []
    with table.work.Workers(1, said.append) as workers:
        workers.run(jobs)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["made", "kept", "made"]
    assert said[0] == "1 of 3 were made before" and len(said) == 3


# ---- the whole


@pytest.mark.slow
@pytest.mark.long
def test_the_smallest_table_from_end_to_end(tmp_path: Path) -> None:
    arguments = ["--size", "smoke", "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "gkd_table_smoke.json")]
    command = [sys.executable, "-m", "gkd", "bench", "table", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gkd_table_smoke.json").read_text())
    with (tmp_path / "gkd_table_smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["cells"]) > 30 and not any("failed" in cell for cell in record["cells"])
    assert "initial student" in done.stdout and "λ = 0.5" in done.stdout

    again = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0 and " of " in again.stdout and "min left" not in again.stdout
    assert json.loads((tmp_path / "gkd_table_smoke.json").read_text())["cells"] == record["cells"]

    page = tmp_path / "page.md"
    names = ("gkd_table", "gkd_table-tasks", "gkd_table-grid", "gkd_table-temperature", "gkd_table-ratios")
    page.write_text("".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names))
    tables = [sys.executable, str(BENCHMARKS / "tables.py"), "--results", str(tmp_path), "--write", str(page)]
    assert subprocess.run([*tables, "--plots", str(tmp_path)], capture_output=True, check=False).returncode == 0
    assert page.read_text().count("| SFT |") == 2 and (tmp_path / "gkd_table_smoke_grid.svg").exists()


def test_options_that_make_no_sense_are_refused_at_once() -> None:
    command = [sys.executable, "-m", "gkd", "bench", "table", "--size", "huge"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "huge" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_outside_of_a_checkout_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    import gkd
    from gkd.cli.app import app
    from gkd.errors import InputError

    monkeypatch.setattr(gkd, "__file__", str(tmp_path / "gkd" / "__init__.py"))
    error = CliRunner().invoke(app, ["bench", "table", "--size", "smoke"]).exception
    assert isinstance(error, InputError) and "pip install -e" in str(error)
