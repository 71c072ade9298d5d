"""Figures of README and docs are those of the recorded results, and a lie in either is found."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from launching import run_python

from benchmarks.figures import claims, judging
from benchmarks.figures.evidence import runs
from benchmarks.records import RESULTS, ROOT
from gkd.bench import tables


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """README, docs and results, to lie in."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(RESULTS, tmp_path / "results")
    return tmp_path


def claim_named(name: str) -> judging.Claim:
    (claim,) = (claim for claim in claims.CLAIMS if claim.name == name)
    return claim


def lie_on(page: Path, says: str, figure: str) -> None:
    """Puts another figure where the claim's is."""
    text = page.read_text()
    found = re.search(says, text)
    assert found is not None
    page.write_text(text[: found.start(1)] + figure + text[found.end(1) :])


def lie_in(path: Path, factor: float, *keys: str) -> None:
    """Multiplies a number of a JSON; of a CSV the numbers of a column in one implementation's rows."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        holder = record
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] *= factor
        path.write_text(json.dumps(record))
        return
    implementation, column = keys
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["implementation"] == implementation:
            row[column] = str(factor * float(row[column]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def wrong(*arguments: object) -> set[str]:
    """What `benchmarks.figures.claims` objects to."""
    done = run_python(["-m", "benchmarks.figures.claims", *map(str, arguments)], timeout_s=100)
    assert "Traceback" not in done.stderr and done.returncode == bool(done.stderr)
    return set(done.stderr.splitlines())


# ---- as pages state them


def test_readme_and_docs_say_what_the_results_say() -> None:
    assert not wrong()


@pytest.mark.parametrize(
    ("name", "page", "lie"),
    [
        ("quickstart: forward KL left, %", "README.md", "12.3"),
        ("quickstart: wall_s", "README.md", "3m59s"),
        ("quickstart: time/sync_s", "docs/index.md", "5m00s"),
        ("divergence: eager, least × gkd's time", "docs/benchmarks.md", "77.7"),
        ("served teacher: bytes a token ÷ H", "docs/serving.md", "1"),
        ("versus TRL: speed-up", "docs/benchmarks.md", "12.53"),
        ("served teacher: bytes, 128 log-probabilities ÷ hidden states", "docs/serving.md", "17.99"),
    ],
)
def test_a_lie_on_a_page_is_found(copy: Path, name: str, page: str, lie: str) -> None:
    before = set(claims.stale(copy, copy / "results"))
    claim = claim_named(name)
    lie_on(copy / page, claim.says, lie)
    (found,) = wrong("--root", copy, "--results", copy / "results") - before
    assert found.startswith(f"{page}: {name}: says {lie}, {claim.figure.file} says ")


def test_a_second_figure_a_lost_sentence_and_a_lost_file_are_found(copy: Path) -> None:
    before = set(claims.stale(copy, copy / "results"))
    readme = copy / "README.md"
    text = readme.read_text().replace("benchmarks/results/versus_trl_cpu.json", "elsewhere")
    readme.write_text(text.replace("loss  ", "divergence  ") + "\n24 steps in 1m00s\n")
    found = "\n".join(sorted(set(claims.stale(copy, copy / "results")) - before))
    assert "README.md: quickstart: wall_s: says 1m00s" in found
    assert "README.md: quickstart: loss_first: not there" in found
    assert "README.md: versus TRL: memory: does not name benchmarks/results/versus_trl_cpu.json" in found


def test_a_lie_in_a_result_is_found(copy: Path) -> None:
    before = set(claims.stale(copy, copy / "results"))
    lie_in(copy / "results" / "packing_cpu.json", 10, "ways", "packed", "speedup")
    (copy / "results" / "teacher_scoring_cpu.json").unlink()
    found = set(claims.stale(copy, copy / "results")) - before
    (lie,) = (line for line in found if "packing_cpu.json says" in line)
    assert lie.startswith("docs/benchmarks.md: packing: speed-up: says ")
    assert (
        sum("but there is no" in line and "teacher_scoring_cpu.json" in line for line in found) == len(found) - 1 == 4
    )


def test_what_is_not_measured_yet_may_be_missing(copy: Path) -> None:
    """Results and their sentence come and go together."""
    claim = judging.Claim("speed", r"([\d.]+) apples", judging.of("none.json", "apples"))
    check = judging.disagreements
    assert check(claim, copy, copy / "results") == []
    (copy / "results" / "none.json").write_text('{"apples": 3.14}')
    assert "not there" in check(claim, copy, copy / "results")[0]
    with (copy / "README.md").open("a") as readme:
        readme.write("3.1 apples, benchmarks/results/none.json")
    assert check(claim, copy, copy / "results") == []


@pytest.mark.parametrize(
    ("text", "figure", "agree"),
    [
        ("22.3", 22.26, True), ("22.3", 22.36, False), ("6m46s", 405.657, True), ("6m45s", 405.657, False),
        ("1.3e-07", 1.313e-7, True), ("1.3e-07", 1.4e-7, False), ("3313", 3313.2, True), ("1,159", 1159.4, True),
        ("0.1s", 0.137, True), ("31s", 30.7, True), ("31s", 30.2, False), ("2", 2.01, True),
    ],
)  # fmt: skip
def test_a_figure_agrees_to_the_last_digit_shown(text: str, figure: float, agree: bool) -> None:
    assert judging.agrees(text, figure) == agree


# ---- against new results


def test_every_small_run_that_claims_name_exists() -> None:
    names = {run.name for run in runs(Path(), Path())}
    named = {claim.again.run for claim in claims.CLAIMS if claim.again}
    assert {"divergence", "versus_trl", "quickstart"} < named <= names
    assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS)


def test_the_recorded_results_hold_against_themselves() -> None:
    results = RESULTS
    names = {run.name for run in runs(Path(), Path())}
    verdicts = claims.compared(results, results, names)
    assert all(one.holds for one in verdicts if one.claim.again and one.committed is not None)
    assert sum(one.holds is True for one in verdicts) > 20


@pytest.mark.parametrize(
    ("name", "factor", "keys"),
    [
        ("packing: speed-up", 0.8, ("ways", "packed", "speedup")),  # within its margin, and slower than padded
        ("packing: difference of gradients", 100, ("ways", "packed", "gradient_difference_float32")),
        ("linear: gkd's gradient error", 10, ("gkd", "gradient_error")),
        ("quickstart: JSD before", 1.2, ("summary", "heldout_jsd_before")),
    ],
)
def test_what_no_longer_holds_is_found(copy: Path, name: str, factor: float, keys: tuple[str, ...]) -> None:
    fresh = copy / "results"
    lie_in(fresh / claim_named(name).figure.file, factor, *keys)
    (found,) = (line for line in wrong("--now", fresh) if "committed" in line)
    assert found.startswith(f"{name}: now ")


def test_the_table_of_ways_to_distil_says_what_is_claimed_of_it() -> None:
    """Its claims read sentences that a script writes: each finds its own figure once, a negative one too."""
    sentence = "In {} accuracy on-policy GKD gains {:.2f} to {:.2f} times what supervised KD does."
    assert sentence.split("{")[0] in Path(tables.__file__).read_text()
    page = " ".join([sentence.format("greedy", -0.25, 1.5), sentence.format("sampled", -3, 4), "of which 0 failed, in"])
    names = [f"{which} ratio of gains, {kind}" for kind in ("greedy", "sampled") for which in ("least", "greatest")]
    found = [re.findall(claim_named(f"ways to distil: {name}").says, page) for name in [*names, "failed cells"]]
    assert found == [["-0.25"], ["1.50"], ["-3.00"], ["4.00"], ["0"]]


def test_a_run_without_results_does_not_hold_unless_it_was_not_asked_for(copy: Path) -> None:
    (copy / "results" / "packing_cpu.json").unlink()
    for asked_for, holds in (({"packing"}, False), ({"divergence"}, None)):
        verdicts = claims.compared(RESULTS, copy / "results", asked_for)
        found = [one for one in verdicts if one.claim.again and one.claim.again.run == "packing"]
        assert len(found) == 3 and all(one.holds is holds for one in found)


def test_the_quickstart_nearly_halves_what_the_cut_left() -> None:
    summary = json.loads((RESULTS / "quickstart.json").read_text())["summary"]
    assert summary["heldout_forward_kl_before"] < 2.1 and summary["heldout_forward_kl_after"] < 1.2
