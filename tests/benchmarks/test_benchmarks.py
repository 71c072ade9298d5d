"""The benchmarks run from end to end on tiny shapes, and their figures become tables and back."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import check, run_python

from benchmarks.losses import measure

NUMBERS = ("ms_p20", "ms_p50", "ms_p80", "gb_per_s", "copy_share", "ratio_to_gkd", "copy_gb_per_s")
CASES = {
    "divergence": ["--shapes", "8x1000", "5x300", "--kinds", "jsd", "reverse_kl", "--ignored", "0.3"],
    "linear_divergence": ["--shapes", "6x16x24x500", "--kinds", "jsd", "--temperature", "2", "--chunk-mib", "1"],
}
UNCOMPILED = {
    "divergence": ["eager", "eager_fp32", "liger_jsd", "liger_jsd_log_probs"],
    "linear_divergence": ["torch_plain", "trl_chunked", "liger_chunked", "liger_fused", "linear_cross_entropy"],
}


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", f"benchmarks.{name}", *map(str, arguments)], timeout_s=300)


def measured(name: str, out: Path, *arguments: object) -> list[dict[str, str]]:
    """The rows that a tiny run of a loss's benchmark writes."""
    options = [*CASES[name], "--device", "cpu", "--repeats", 2, "--quick", "--out", out, *arguments]
    check(run_benchmark(f"losses.{name}", *options))
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CSV of each script, without what has to be compiled."""
    folder = tmp_path_factory.mktemp("results")
    for name in CASES:
        measured(name, folder / f"{name}_cpu.csv", "--only", *UNCOMPILED[name])
    return folder


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}_cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", CASES)
def test_every_implementation_has_figures_or_a_reason(name: str, results: Path) -> None:
    rows = rows_of(results, name)
    assert {row["implementation"] for row in rows} >= {"gkd", *UNCOMPILED[name]}
    for row in rows:
        if row["ms_p50"]:
            assert all(float(row[column]) > 0 for column in NUMBERS), row
            assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
            assert float(row["peak_extra_mb"]) >= 0
        else:
            assert row["implementation"] not in ("gkd", "eager", "eager_fp32", "torch_plain", "bare_gemms")
            assert "needs a GPU" in row["note"] or "not installed" in row["note"] or "no linear_cross" in row["note"]


@pytest.mark.parametrize("name", CASES)
def test_errors_are_small_for_gkd_and_for_whoever_computes_in_float32(name: str, results: Path) -> None:
    rows = rows_of(results, name)
    for row in rows:
        if row["implementation"] == "gkd":
            assert float(row["value_error"]) < 1e-5 and float(row["ratio_to_gkd"]) == 1
        if row["implementation"] in ("gkd", "eager_fp32", "trl_chunked") and row["gradient_error"]:
            assert float(row["gradient_error"]) < 4e-3  # one rounding to bfloat16
    with_gradient = [row for row in rows if row["implementation"] == "gkd" and row["work"] == "value+gradient"]
    assert with_gradient and all(float(row["gradient_error"]) > 0 for row in with_gradient)


def test_the_byte_model(results: Path) -> None:
    """6 bytes a live pair, 2 an ignored one; the value alone 4 a live pair."""
    rows = [row for row in rows_of(results, "divergence") if row["implementation"] == "gkd" and row["rows"] == "8"]
    of_work = {row["work"]: float(row["gb_per_s"]) * float(row["ms_p50"]) * 1e6 for row in rows if row["kind"] == "jsd"}
    pairs_read = of_work["value"] / 4
    assert of_work["value+gradient"] == pytest.approx(4 * pairs_read + 2 * 8 * 1000, rel=2e-3)
    assert pairs_read / 1000 == pytest.approx(round(pairs_read / 1000), rel=2e-3)
    assert pairs_read < 8 * 1000


@pytest.mark.slow
@pytest.mark.long
def test_compiled_implementations_run(tmp_path: Path) -> None:
    arguments = ["--only", "compiled", "compiled_fp32", "--works", "value+gradient", "--kinds", "jsd"]
    rows = measured("divergence", tmp_path / "out.csv", *arguments, "--shapes", "8x1000")
    compiled = [row for row in rows if row["implementation"].startswith("compiled")]
    assert len(compiled) == 2 and all(row["ms_p50"] and row["note"].startswith("compiled in") for row in compiled)


def test_a_peer_that_fails_keeps_its_reason_and_gkd_must_not() -> None:
    def fails() -> object:
        raise ValueError("first line\nsecond line")

    def works() -> object:
        return measure.Candidate(lambda index: (torch.ones(()),))

    copied = measure.copy_call(1024, "cpu")
    found, _ = measure.measure({"gkd": works, "peer": fails}, "cpu", 2, copied)
    assert found["gkd"].timing is not None
    assert found["peer"].timing is None and found["peer"].note == "ValueError: first line"
    with pytest.raises(ValueError, match="first line"):
        measure.measure({"gkd": fails}, "cpu", 2, copied)


def test_rounds_alternate() -> None:
    called: list[str] = []

    def call(name: str) -> object:
        return lambda index: called.append(name) or ()

    measure.time_round_robin({name: call(name) for name in "abc"}, "cpu", 20)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert all(sorted(one) == list("abc") for one in rounds) and len(set(rounds)) > 1


PEAK_OF_TWO_TENSORS = """
import torch
from benchmarks.losses import measure

def call(index):
    first = torch.ones(4 << 20)  # 16 MiB of float32
    second = first * 2
    del first
    return (second + 1,)

call(0)
print(measure.peak_extra_bytes(call, "cpu"))
"""


def test_peak_memory_counts_what_is_held_at_once() -> None:
    """In a process of its own: the tests before this one leave holes that tensors could hide in."""
    done = check(run_python(["-c", PEAK_OF_TWO_TENSORS]))
    if done.stdout.strip() == "None":
        pytest.skip("this kernel does not reset the high-water mark of memory")
    assert int(done.stdout) == pytest.approx(32 << 20, rel=0.1)


def test_tables_are_what_the_results_say(results: Path, tmp_path: Path) -> None:
    names = ("divergence", "divergence-full", "linear_divergence")
    page, folder = tmp_path / "page.md", tmp_path / "results"
    sections = "".join(f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->\nbetween\n" for name in names)
    page.write_text(f"before\n{sections}after\n")
    folder.mkdir()
    for path in results.glob("*.csv"):
        (folder / path.name).write_text(path.read_text())

    def tables(option: str) -> int:
        return run_benchmark("figures.tables", "--results", folder, option, page).returncode

    assert tables("--check") == 1
    assert tables("--write") == 0 and tables("--check") == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- begin: divergence -->\n") and text.count("between") == 3
    assert text.endswith("<!-- end: linear_divergence -->\nbetween\nafter\n") and "old" not in text
    assert "| 8 × 1000, bfloat16, jsd(0.5) |" in text and "| bare_gemms |" in text
    changed = folder / "divergence_cpu.csv"
    rows = rows_of(folder, "divergence")
    changed.write_text(changed.read_text().replace(rows[0]["ms_p50"], "12345"))
    assert tables("--check") == 1
    assert tables("--write") == 0 and "12345" in page.read_text()


def test_tables_want_their_markers(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in ("nothing", "<!-- begin: unknown -->\n<!-- end: unknown -->", "<!-- begin: divergence -->\n"):
        page.write_text(text)
        done = run_benchmark("figures.tables", "--results", results, "--write", page)
        assert done.returncode != 0 and "Traceback" not in done.stderr and str(page) in done.stderr


def test_plots(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run_benchmark("figures.tables", "--results", results, "--plots", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg"} and len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
@pytest.mark.long
def test_packed_padded_and_compiled_rollouts_have_the_same_gradient(tmp_path: Path) -> None:
    arguments = ["--batch", "3", "--max-new-tokens", "6", "--rounds", "1", "--micro-batch-size", "2"]
    arguments += ["--micro-batch-tokens", "100", "--work", str(tmp_path), "--out", str(tmp_path / "packing.json")]
    check(run_benchmark("runs.packing", *arguments))
    record = json.loads((tmp_path / "packing.json").read_text())
    assert all(way["gradient_difference_float32"] < 1e-4 and way["speedup"] > 0 for way in record["ways"].values())


def test_a_run_that_is_to_be_recorded_has_to_be_there() -> None:
    done = run_benchmark("runs.record", "missing-folder", "out.json")
    assert "FileNotFoundError" in done.stderr and "missing-folder" in done.stderr
