"""Names: one list, in code and in the page, and nothing logged beside it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest

from gkd.monitor import METRICS, merge_metrics
from gkd.monitor.metrics import description_of, in_order, metrics_table

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
REQUIRED = [
    "step",
    "loss",
    "divergence/forward_kl",
    "tokens/scored",
    "tokens/generated",
    "time/sample_s",
    "time/score_s",
    "time/train_s",
    "time/sync_s",
    "mixture/student",
    "sync/max_logprob_error",
]


def test_the_page_lists_exactly_the_metrics() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(METRICS)
    assert metrics_table() in page, "put the output of gkd.monitor.metrics.metrics_table() into docs/metrics.md"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_unit_and_a_meaning(name: str) -> None:
    unit, colon, meaning = METRICS[name].partition(": ")
    assert unit and colon and meaning
    assert "\n" not in meaning


def test_what_a_run_has_to_log_is_documented() -> None:
    assert None not in [description_of(name) for name in REQUIRED]


def test_a_star_stands_for_one_name() -> None:
    assert description_of("objective/soft/loss") == METRICS["objective/*/loss"]
    assert description_of("mixture/replay") == METRICS["mixture/*"]
    for name in ("objective//loss", "objective/a/b/loss", "objective/soft", "mixture/", "mixture/a/b"):
        assert description_of(name) is None, name
    assert in_order(["unknown", "mixture/b", "mixture/a", "loss"]) == ["loss", "mixture/a", "mixture/b", "unknown"]


def test_groups_are_merged_in_order() -> None:
    merged = merge_metrics({"step": 1, "loss": 2.0}, {"lr": 1e-4, "loss": 2.0}, {"grad_norm": float("nan")})
    assert list(merged) == ["step", "loss", "lr", "grad_norm"]


def test_a_name_twice_with_different_values_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'loss' is logged twice in one step: 1\.0 and 2\.0"):
        merge_metrics({"loss": 1.0}, {"loss": 2.0})
    assert str(merge_metrics({"loss": float("nan")}, {"loss": float("nan")})["loss"]) == "nan"


def test_an_undocumented_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'los' is not described"):
        merge_metrics({"los": 1.0})


@pytest.mark.parametrize("value", [True, None, [1.0], numpy.float32(1.0)])
def test_only_plain_values_are_taken(value: object) -> None:
    with pytest.raises(ValueError, match=r"'loss' is a .*: give a plain float, int or str"):
        merge_metrics({"loss": value})  # pyright: ignore[reportArgumentType]
