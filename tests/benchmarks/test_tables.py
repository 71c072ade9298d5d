"""Sections that the other tests' small runs do not make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import check, run_python

from benchmarks.records import RESULTS


def tables(*arguments: object) -> None:
    check(run_python(["-m", "benchmarks.figures.tables", *map(str, arguments)], timeout_s=100))


@pytest.fixture
def scaling() -> dict[str, Any]:
    """A record as benchmarks.runs.scaling writes it: what is sampled grows as planned, a step does not."""
    points = [
        {
            "axis": axis,
            "value": value,
            "seconds": {"sample": float(value), "step": 2.0},
            "planned_seconds": {"sample": float(value), "step": float(value)},
        }
        for axis, values in (("batch_size", (4, 8, 16)), ("ranks", (1, 2)))
        for value in values
    ]
    exponents = {"sample": {"measured": 1.0, "planned": 1.0}, "step": {"measured": 0.0, "planned": 1.0}}
    return {
        "device": "2 x a processor", "threads": 1, "versions": "gkd 0.1.0", "sampler": "transformers", "steps": 6,
        "points": points, "exponents": {"batch_size": exponents, "ranks": exponents},
    }  # fmt: skip


def test_growth_becomes_a_table_and_a_plot(scaling: dict[str, Any], tmp_path: Path) -> None:
    page, plots = tmp_path / "page.md", tmp_path / "plots"
    page.write_text("<!-- begin: scaling -->\n<!-- end: scaling -->\n")
    tables("--results", tmp_path, "--write", page)
    assert "Not measured yet." in page.read_text()
    (tmp_path / "scaling_cpu.json").write_text(json.dumps(scaling))
    tables("--results", tmp_path, "--write", page, "--plots", plots)
    text = page.read_text()
    assert "| sequences a step | 4 – 16 | 1.00 (1.00) | 0.00 (1.00) |" in text
    assert "| ranks | 1 – 2 |" in text and "](plots/scaling_cpu.svg)" in text
    drawn = (plots / "scaling_cpu.svg").read_bytes()
    tables("--results", tmp_path, "--plots", plots)
    assert (plots / "scaling_cpu.svg").read_bytes() == drawn
    scaling["points"][0]["seconds"]["step"] = 3.0
    (tmp_path / "scaling_cpu.json").write_text(json.dumps(scaling))
    tables("--results", tmp_path, "--plots", plots)
    assert (plots / "scaling_cpu.svg").read_bytes() != drawn


def test_the_quickstarts_table_is_its_record(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: quickstart -->\n<!-- end: quickstart -->\n")
    tables("--write", page)
    summary = json.loads((RESULTS / "quickstart.json").read_text())["summary"]
    before, after = (summary[f"heldout_forward_kl_{when}"] for when in ("before", "after"))
    assert f"| forward KL | {before:.3f} | {after:.3f} | {100 * after / before:.1f} % |" in page.read_text()
